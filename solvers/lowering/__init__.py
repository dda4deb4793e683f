"""Torch functions as CasADi expressions: what the casadi solver and the lowered kernel of DDP are made from."""
