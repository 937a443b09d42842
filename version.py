"""The version, said once: `nibble version`, package metadata, what a conversion's fingerprint holds."""

__version__ = "0.1.0"
