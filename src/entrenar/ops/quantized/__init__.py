"""Quantized weights: formats that hold a matrix in few bits, and the products and look-ups over them."""
