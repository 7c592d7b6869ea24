"""The protocol: `split.proto`, and the files that `protoc` generates from it, which are not edited."""
