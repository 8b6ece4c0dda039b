"""The model: files, formats, kernels, KV cache, scheduler, sampling. Knows nothing of Ray or gRPC."""
