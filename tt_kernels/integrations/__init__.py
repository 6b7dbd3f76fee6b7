"""Our ops inside other people's models. Each part imports the package it serves when it is used, never before."""
