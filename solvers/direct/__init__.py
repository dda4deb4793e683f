"""Direct transcription: the problem becomes one nonlinear program, written in CasADi and solved by IPOPT."""
