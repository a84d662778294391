"""The code of a patched model in mlx-vlm, without torch. `runtime/bundle.py` joins it with parts of `runtime/`."""
