"""The kernel of DDP on lowered functions: CasADi's virtual machine for one problem, numpy arrays for a batch."""
