"""TEMPORARY stand-in."""
from dataclasses import dataclass
from typing import NamedTuple
class Action(NamedTuple):
    kind: str
    stage: int
    microbatch: int
class Send(NamedTuple):
    to_rank: int
    message: tuple
class Recv(NamedTuple):
    from_rank: int
    message: tuple
@dataclass(frozen=True)
class Schedule:
    ranks: tuple
    stage_rank: tuple
    @property
    def num_stages(self): return len(self.stage_rank)
    @property
    def num_ranks(self): return len(self.ranks)
    @property
    def num_microbatches(self): return 1+max(a.microbatch for r in self.ranks for a in r)
    @property
    def splits(self): return any(a.kind=="W" for r in self.ranks for a in r)
def one_f_one_b(p, m):
    out = []
    for r in range(p):
        w = min(p - 1 - r, m); a = [Action("F", r, i) for i in range(w)]; f, b = w, 0
        while b < m:
            if f < m: a.append(Action("F", r, f)); f += 1
            a.append(Action("B", r, b)); b += 1
        out.append(tuple(a))
    return Schedule(tuple(out), tuple(range(p)))
def interleaved(p, m, v):
    def order(fwd):
        o = []
        for g in range(0, m, p):
            for c in (range(v) if fwd else reversed(range(v))): o += [(c, i) for i in range(g, g + p)]
        return o
    out = []
    for r in range(p):
        f, b = order(True), order(False); w = min((p - r - 1) * 2 + (v - 1) * p, len(f)); a = []; mk = lambda k, ci: Action(k, ci[0] * p + r, ci[1])
        a += [mk("F", x) for x in f[:w]]; i = w
        for x in b:
            if i < len(f): a.append(mk("F", f[i])); i += 1
            a.append(mk("B", x))
        out.append(tuple(a))
    return Schedule(tuple(out), tuple(s % p for s in range(p*v)))
def rank_programs(s):
    sched, where, S = s.ranks, s.stage_rank, s.num_stages
    end, start, pc, free = {}, {}, [0] * len(sched), [0] * len(sched)
    dur={"F":1,"B":2,"W":1}
    while any(pc[r] < len(q) for r, q in enumerate(sched)):
        go = False
        for r, q in enumerate(sched):
            while pc[r] < len(q):
                k, st, i = q[pc[r]]; dep = ([("F", st - 1, i)] if st else []) if k == "F" else [("F", st, i)] + ([("B", st + 1, i)] if st < S - 1 else []) if k=="B" else [("B",st,i)]
                if any(d not in end for d in dep): break
                start[(k, st, i)] = max([free[r]] + [end[d] for d in dep]); free[r] = end[(k, st, i)] = start[(k, st, i)] + dur[k]; pc[r] += 1; go = True
        if not go: raise ValueError("deadlock")
    msgs = []
    for r, q in enumerate(sched):
        for k, st, i in q:
            t = st + 1 if k == "F" else st - 1 if k=="B" else -1
            if 0 <= t < S and where[t] != r: msgs.append((end[(k, st, i)], r, where[t], (k, t, i)))
    prog = []
    for r, q in enumerate(sched):
        ev = [((start[a], 1, j), a) for j, a in enumerate(q)] + [((t, 0, src, m), Send(dst, m) if src == r else Recv(src, m)) for t, src, dst, m in msgs if r in (src, dst)]
        prog.append(tuple(a for _, a in sorted(ev, key=lambda e: (e[0][0], e[0][1], str(e[0][2:]) if e[0][1] == 0 else "", e[0][2] if e[0][1] else 0))))
    return tuple(prog)
