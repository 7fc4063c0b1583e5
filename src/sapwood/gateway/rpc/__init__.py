"""Workers that are reached by gRPC: SGLang's service, rpc/scheduler.proto. Needs grpcio."""
