"""The attention side on a CUDA GPU. Importing it needs neither CuPy nor a GPU; running it needs both."""
