r"""Backward passes: one fold over the links of a path, and one short function for each kind of link.

Q is the cost from a place on. Its *model* there comes in four representations, a path in four kinds of link; the fold
is :func:`~ocnopt.differential.sweep.sweep`, and each cell names what carries a model over a link:

    model         control step           Runge-Kutta step         layer of a network    stretch of continuous time
    -----------   --------------------   ----------------------   -------------------   --------------------------
    costate       sweep.bellman_step     discrete.DiscreteStep,   autograd              stretches.carry of
                  (its row J)            discrete.layer_step                            columns.Columns, no axis
    columns       -                      -                        layers.cooperative,   stretches.carry of
                                                                  layers.feedback, ..   columns.Columns
    matrix        sweep.bellman_step     -                        -                     stretches.carry of
                                                                                        matrix.Matrix
    directional   -                      -                        -                     stretches.carry of
                                                                                        hvp.Directional

The row J is the gradient of the cost under the feedback law, the costate where the path is optimal. In homogeneous
coordinates (1, dX) the matrix is the symmetric V, and the others follow: columns are V = sum s_i y_i y_i^T, the costate
is one column, directional is V (0, dX). Derivatives of a problem's functions come from :mod:`ocnopt.linearise`.

Words:

    stage         an evaluation inside a Runge-Kutta step; in a discrete problem the functions of its control steps
    step          a control step or an accepted Runge-Kutta step    path       states with their links
    stretch       continuous time between two kept states           walk       from the start of a path to its end
    interval      where one control acts, or between two outputs    sweep      the fold backward
    link          a step, a stretch, a layer                        gather     what is summed over accepted stages
    block         a tensor that is integrated                       witness    one number of it under step control

Letters, the same in :mod:`ocnopt.linearise`; where one stands for two things, the second is in brackets:

    x (..., n)    state                                l, Phi           running and terminal cost
    u (..., m)    staged control                       V, V_p, V_pp     the matrix of Q in (1, dX), X = (x, u), and p
    p (q,)        static control, T last if free       a                costate, the first n entries of Q_X
    t, T          time, end time                       q_i, p_i, s_i    a column in X and in p, its sign [q: size of p]
    F (..., n)    dx/dt; of a control step, its map    r                a fixed direction, for witnesses
    G             [0  F_X], its generator              v, dx, da, hv    a direction in p, and what follows it
    w (..., d)    (x, u) of a control step             s, k, K          (1, dx) and the gains of a control step
    h, b, c       step size, weights, times of stages  N, R, B          steps, columns, samples

:mod:`ocnopt.differential.kronecker` has letters of its own, those of its sources.
"""
