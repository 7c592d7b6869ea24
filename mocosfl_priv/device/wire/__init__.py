"""The protocol: `split.proto`, and what `protoc` makes of it. Generated files are not edited."""
