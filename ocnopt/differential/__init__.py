r"""Backward passes: one fold over the links of a path, and one short function for each kind of link.

Q is the cost from a place on. Its *model* there comes in four representations, a path in three kinds of link; the fold
is :func:`~ocnopt.differential.sweep.sweep`, and each cell names what carries a model over a link:

    model         control step                accepted Runge-Kutta step     stretch of continuous time
    -----------   -------------------------   ---------------------------   ---------------------------------------
    costate       column 0 of the matrix      discrete.DiscreteStep         path.carry of columns.Columns, no axis K
    columns       -                           -                             path.carry of columns.Columns
    matrix        sweep.bellman_step          -                             path.carry of matrix.Matrix
    directional   -                           -                             path.carry of hvp.Directional

In homogeneous coordinates (1, dX) the matrix is the symmetric V, and all follow from it: columns are V = sum s_i y_i
y_i^T, the costate is one column, directional is V (0, dX). Derivatives of a problem's functions come from
:mod:`ocnopt.linearise`.

Words:

    stage         an evaluation inside a Runge-Kutta step           path       states with their links
    step          a control step or an accepted Runge-Kutta step    walk       the integration forward
    stretch       continuous time between two kept states           sweep      the fold backward
    interval      where one control acts, or between two outputs    gather     what is summed over accepted stages
    link          a step, a stretch, a layer                        witness    one number of it under step control

Letters:

    x (..., n)    state                                l, Phi           running and terminal cost
    u (..., m)    staged control                       V, V_p, V_pp     the matrix of Q in (1, dX), X = (x, u), and p
    p (q,)        static control, T last if free       a                costate, the first n entries of Q_X
    t, s, T       time, unit time, end time            q_i, p_i, s_i    a column in X and in p, its sign
    F (..., n)    dx/dt; of a control step, its map    r                a fixed direction, for witnesses
    G             [0  F_X], its generator              v, dx, da, hv    a direction in p, and what follows it
    w (..., d)    (x, u) of a control step             k, K             gains of a control step
    h, b, c       step size, weights, times of stages  N, K, B          steps, columns, samples
"""
