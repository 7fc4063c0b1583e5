"""The building blocks of models: attention, linear layers, norms, embeddings, pooling."""
