"""Methods with the verb of this folder; see `lilliput.methods`."""
