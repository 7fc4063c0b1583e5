"""What pictures take in memory while they are drawn, told before it is taken.

Beside the weights, two things grow with a picture: the numbers between the layers of the
transformer, with the tokens of a step, and those of the autoencoder, with the pixels of what it
computes in one piece. The two never work at once, so that the larger one counts.
"""

from __future__ import annotations

from dataclasses import dataclass

from sapwood.base.errors import InvalidRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureMemory:
    """Estimates, on the safe side.

    free_bytes        that pictures may take together
    bytes_per_token   of a step
    bytes_per_pixel   of a piece that the autoencoder computes
    piece_pixels      the most pixels of a piece, with tiles; None: a picture is one piece
    pixels_per_token  of the picture, for what is said of sizes
    """

    free_bytes: int
    bytes_per_token: int
    bytes_per_pixel: int
    piece_pixels: int | None
    pixels_per_token: int

    def step_bytes(self, num_tokens: int) -> int:
        return num_tokens * self.bytes_per_token

    def piece_bytes(self, num_pixels: int) -> int:
        """Of the autoencoder, for a picture of so many pixels."""
        if self.piece_pixels is not None:
            num_pixels = min(num_pixels, self.piece_pixels)
        return num_pixels * self.bytes_per_pixel

    @property
    def max_tokens(self) -> int:
        """Of a step."""
        return self.free_bytes // self.bytes_per_token

    @property
    def max_pixels(self) -> int:
        """Of one picture that is drawn with one pass, its prompt's tokens left out."""
        by_step = self.max_tokens * self.pixels_per_token
        if self.piece_pixels is not None:
            return by_step if self.piece_bytes(self.piece_pixels) <= self.free_bytes else 0
        return min(by_step, self.free_bytes // self.bytes_per_pixel)

    def check_pixels(self, num_pixels: int, *, param: str = "size") -> None:
        """InvalidRequest if the autoencoder cannot have that picture in memory."""
        need = self.piece_bytes(num_pixels)
        if need > self.free_bytes:
            fits = self.free_bytes // self.bytes_per_pixel
            tiles = ", or start the server with --vae-tiling" if self.piece_pixels is None else ""
            raise InvalidRequest(
                f"a picture of {num_pixels} pixels takes about {need / 1e9:.2f} GB to become "
                f"pixels, but {self.free_bytes / 1e9:.2f} GB were free at the start beside the "
                f"weights; ask for at most {fits} pixels{tiles}",
                param=param,
            )

    def check_tokens(self, num_tokens: int) -> None:
        """InvalidRequest if a step of that picture alone does not fit."""
        need = self.step_bytes(num_tokens)
        if need > self.free_bytes:
            raise InvalidRequest(
                f"a step of this picture has {num_tokens} tokens, both passes of guidance and "
                f"pictures to look at included, and takes about {need / 1e9:.2f} GB, but "
                f"{self.free_bytes / 1e9:.2f} GB were free at the start beside the weights, which "
                f"is enough for {self.max_tokens} tokens; ask for a smaller size",
                param="size",
            )
