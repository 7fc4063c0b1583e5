"""The routes by which cloud hosts call a model in a container: SageMaker and Vertex."""
