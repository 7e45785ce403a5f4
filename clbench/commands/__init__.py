"""What `clbench` can do: a module a command, each with `arguments(parser)` and `main(options) -> exit status`."""
