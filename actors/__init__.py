"""The Ray actors: lifecycle only, thin over `numoe.engine`."""
