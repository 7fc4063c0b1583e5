"""The gRPC service of engines, for those who serve it and those who ask it. Needs grpcio."""
