"""Images in prompts: files read, cut and embedded beside the engine's loop, by the model's own vision tower."""

KEPT_BYTES = 2**27  # of embeddings, for images that come again


class ImageRefusedError(ValueError):
    """An image that is not read: the `index`-th of several; None: none of them could be encoded."""

    def __init__(self, message: str, index: int | None):
        super().__init__(message)
        self.index = index
