"""How a service runs a gRPC server: options, health, life cycle, errors on the wire."""
