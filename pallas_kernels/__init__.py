"""Pallas kernels: arrays in, arrays out. One folder an op, one public function each, e.g. `pallas_kernels.grouped_matmul`."""
