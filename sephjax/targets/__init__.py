"""Pure compositions of ops that need ground truth."""
