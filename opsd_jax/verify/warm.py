"""Importing this module loads sympy and fills its parser's caches, before workers are forked."""

from opsd_jax.verify.maths import Pair, judge

for gold, answer in (
    (r"\frac{\sqrt{3}}{2}+x^2", r"x^{2}+\frac{1}{2}\sqrt{3}"),
    (r"\{1,2\}", r"[0,1)\cup(2,\infty)"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\left(\log_2 8,\sin\pi\right)"),
):
    judge(Pair(gold, answer))
