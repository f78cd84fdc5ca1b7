"""Find, edit and examine the few weights that a capability of a language model hangs on."""
