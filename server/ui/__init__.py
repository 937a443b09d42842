"""The page at / and /ui: a few static files, without a build step and without an outside address."""
