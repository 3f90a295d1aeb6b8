"""The async shell round the core: runs its actions, holds leases, publishes what changed."""
