"""How bytes come in. Handlers behind it know no gRPC library."""
