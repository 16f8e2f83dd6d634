"""Data in forms of their own: PyTorch's data loaders, tables, masks beside images, Hugging Face's data sets."""
