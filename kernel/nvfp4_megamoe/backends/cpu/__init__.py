"""CPU backend: ``backend.py`` (the class), ``kernel.cpp`` (compiled by ``build.py``), ``torch_path.py`` (without it)."""
