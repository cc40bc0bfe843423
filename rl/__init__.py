"""entrl: entropy-aware RL fine-tuning of language models. The packages are ``rl``, ``rewards`` and ``data``."""

from importlib.util import find_spec
from pathlib import Path

__version__ = "0.1.0"


def _check_siblings() -> None:
    """``data`` and ``rewards`` are common names: a folder of that name elsewhere on the path must not take their place."""
    home = Path(__file__).resolve().parent.parent
    for name in ("data", "rewards"):
        spec = find_spec(name)
        found = Path(spec.origin).resolve().parent.parent if spec and spec.origin else None
        if found != home:
            where = found or (list(spec.submodule_search_locations or ["nowhere"])[0] if spec else "nowhere")
            raise ImportError(
                f"entrl's package {name!r} should lie beside {home / 'rl'}, but Python finds it in {where}. "
                "Start from another folder, use the entrl command, or set PYTHONSAFEPATH=1."
            )


_check_siblings()
