"""Runge-Kutta methods: tableaus as data, one step, fixed and adaptive walks."""
