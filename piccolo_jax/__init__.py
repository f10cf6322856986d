"""Train one text-embedding model for every task: the Piccolo2 recipe in JAX."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from piccolo_jax.encoder import Encoder as Encoder

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Imported when it is asked for: data workers and other commands do without jax.
    if name == "Encoder":
        from piccolo_jax.encoder import Encoder

        return Encoder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
