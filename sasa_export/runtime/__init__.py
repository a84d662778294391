"""The code that runs inside a patched model. It imports only torch and transformers, and reads on its own.

Each file holds one idea. `bundle` joins the files into the one modeling file that travels in a patched directory.
"""
