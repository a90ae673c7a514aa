"""How pages travel: gRPC response streams for now; shared memory and NIXL have their place here."""
