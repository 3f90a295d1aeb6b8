"""The engine in worker processes: a model that dies takes its worker along and nobody else."""
