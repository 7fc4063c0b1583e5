"""From files on disk to tensors with the names that Hugging Face gives them."""
