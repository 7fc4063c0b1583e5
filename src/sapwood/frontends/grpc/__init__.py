"""SGLang's gRPC service (rpc/scheduler.proto): token ids in, token ids out. Needs grpcio."""
