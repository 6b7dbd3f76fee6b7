"""How to see where time goes: README.md walks from "a pass takes X ms" to "this kernel is at Y % because Z"."""
