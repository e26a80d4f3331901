"""CPU backend: ``backend.py`` is the class, ``build.py`` compiles ``kernel.cpp``, ``torch_path.py`` does without."""
