"""Independent answers to compare with: known solutions, dense matrices, and the comparison itself."""
