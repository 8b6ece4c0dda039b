"""Protobuf package `numoe.v1`: the .proto files and the stubs that `scripts/stubs` makes of them."""
