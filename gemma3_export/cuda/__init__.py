"""CUDA without guesswork: the doctor, and operator placement shown without a GPU."""
