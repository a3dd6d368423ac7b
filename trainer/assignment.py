"""Compiled parts of the optimal transport: splitting, searching by price, swapping, bidding and augmenting.

Costs are -p.t for points p [N, D] and targets t [N, D]; `prices` [N] are the dual potentials v of the targets with their
sign turned, so that target j costs point i the value -p_i.t_j - v_j, and v only ever falls. `indices` [N] holds the target
of each point and `owner` [N] the point of each target, -1 where there is none; both are changed in place.
"""

from __future__ import annotations

import heapq

import numpy as np
from numba import njit

_LEAF = 8  # targets per leaf of the search tree, points per group that is searched together
_SAMPLES = 64  # points whose search tells how far shortlists reach
_MOST_CANDIDATES = 4096  # a group of points that cannot tell so many targets apart is searched point by point
_LONGEST = 512  # a list that would grow beyond gives way to all targets
_ROUNDING = 1e-12  # standardised units; differences below are none


@njit(cache=True)
def _select(keys, order, low, high, cut):
    """Reorder order[low:high] so that no key before position `cut` is larger than one after (Hoare 1961)."""
    high -= 1
    while low < high:
        first, middle, last = keys[order[low]], keys[order[(low + high) >> 1]], keys[order[high]]
        pivot = max(min(first, middle), min(max(first, middle), last))
        i, j = low, high
        while i <= j:
            while keys[order[i]] < pivot:
                i += 1
            while keys[order[j]] > pivot:
                j -= 1
            if i <= j:
                order[i], order[j] = order[j], order[i]
                i += 1
                j -= 1
        if cut <= j:
            high = j
        elif cut >= i:
            low = i
        else:
            return


@njit(cache=True)
def median_split(values, parts):
    """Row indices [N] in `parts` groups of equal size (to within one) and where each group starts [parts + 1].

    Every cut is across the widest axis; groups that follow each other are near each other.
    """
    count, dim = values.shape
    keys = np.ascontiguousarray(values.T)
    order = np.arange(count)
    starts = np.empty(parts + 1, np.int64)
    starts[parts] = count
    stack = [(0, count, 0, parts)]
    while len(stack):
        low, high, first, share = stack.pop()
        if share == 1:
            starts[first] = low
            continue
        left = share // 2
        cut = low + (high - low) * left // share
        axis, widest = 0, -1.0
        for d in range(dim):
            least, most = np.inf, -np.inf
            for q in range(low, high):
                least = min(least, keys[d, order[q]])
                most = max(most, keys[d, order[q]])
            if most - least > widest:
                axis, widest = d, most - least
        _select(keys[axis], order, low, high, cut)
        stack.append((cut, high, first + left, share - left))
        stack.append((low, cut, first, left))
    return order, starts


@njit(cache=True)
def price_tree(targets, slopes, prices):
    """Binary tree over the targets that bounds the prices in every node: v_j <= top - slope.(t_j - centre).

    Falling prices keep the bounds true. They are tightest if each target's slope is the point that owns it.

    Returns:
        order [N] of the targets, bounds [nodes, 2 D + 2] with centre, slope, radius and top, right [nodes] the second child
        (the first follows its parent) or -1, span [nodes, 2] in `order`.
    """
    count, dim = targets.shape
    parts = max(1, count // _LEAF)
    order, starts = median_split(targets, parts)
    bounds = np.zeros((2 * parts - 1, 2 * dim + 2))
    right = np.full(2 * parts - 1, -1, np.int64)
    span = np.empty((2 * parts - 1, 2), np.int64)
    stack = [(0, 0, parts)]
    while len(stack):
        node, first, share = stack.pop()
        low, high = starts[first], starts[first + share]
        span[node] = low, high
        row = bounds[node]
        for q in range(low, high):
            for d in range(dim):
                row[d] += targets[order[q], d] / (high - low)
                row[dim + d] += slopes[order[q], d] / (high - low)
        radius, top = 0.0, -np.inf
        for q in range(low, high):
            height, distance = prices[order[q]], 0.0
            for d in range(dim):
                step = targets[order[q], d] - row[d]
                distance += step * step
                height += row[dim + d] * step
            radius = max(radius, distance)
            top = max(top, height)
        row[2 * dim], row[2 * dim + 1] = np.sqrt(radius), top
        if share > 1:
            left = share // 2
            right[node] = node + 2 * left
            stack.append((node + 2 * left, first + left, share - left))
            stack.append((node + 1, first, left))
    return order, bounds, right, span


@njit(cache=True)
def _value(points, i, targets, j, prices):
    """What target j costs point i, its price included."""
    value = -prices[j]
    for d in range(points.shape[1]):
        value -= points[i, d] * targets[j, d]
    return value


@njit(cache=True)
def _lower_bound(bounds, node, points, i):
    """No target of the node costs point i less."""
    dim = points.shape[1]
    value, slack = -bounds[node, 2 * dim + 1], 0.0
    for d in range(dim):
        value -= points[i, d] * bounds[node, d]
        slack += (points[i, d] - bounds[node, dim + d]) ** 2
    return value - np.sqrt(slack) * bounds[node, 2 * dim]


@njit(cache=True)
def _search(points, i, targets, prices, tree, nearest, values, ceiling):
    """Fill `nearest` [K] with the targets of point i that cost at most `ceiling`, the K cheapest if there are more.

    `values` [K] ascends; its last is a limit that no other target undercuts.
    """
    order, bounds, right, span = tree
    size = len(nearest)
    values[:] = ceiling + _ROUNDING
    nearest[:] = -1
    nodes = np.empty(128, np.int64)
    least = np.empty(128)
    top, nodes[0], least[0] = 1, 0, -np.inf
    while top:
        top -= 1
        node = nodes[top]
        if least[top] + _ROUNDING >= values[size - 1]:
            continue
        if right[node] < 0:
            for q in range(span[node, 0], span[node, 1]):
                value = _value(points, i, targets, order[q], prices)
                if value < values[size - 1]:
                    at = size - 1
                    while at > 0 and values[at - 1] > value:
                        values[at], nearest[at] = values[at - 1], nearest[at - 1]
                        at -= 1
                    values[at], nearest[at] = value, order[q]
            continue
        near, far = node + 1, right[node]
        near_bound, far_bound = _lower_bound(bounds, near, points, i), _lower_bound(bounds, far, points, i)
        if far_bound < near_bound:
            near, far, near_bound, far_bound = far, near, far_bound, near_bound
        nodes[top], least[top] = far, far_bound
        nodes[top + 1], least[top + 1] = near, near_bound
        top += 2
    for c in range(size):  # where fewer are as cheap as that, the first stands for the rest
        if nearest[c] < 0:
            nearest[c] = nearest[0]


@njit(cache=True)
def swap(points, targets, indices, neighbours, sweeps=50):  # pragma: no cover - compiled
    """Exchange the targets of two points while that shortens the way, trying each target's neighbours [N, K] (2-opt)."""
    owner = np.empty(len(points), np.int64)
    owner[indices] = np.arange(len(points))
    for _ in range(sweeps):
        swaps = 0
        for j in range(len(points)):
            for n in range(neighbours.shape[1]):
                k = neighbours[j, n]
                a, b = owner[j], owner[k]
                gain = 0.0
                for d in range(points.shape[1]):
                    gain -= (points[a, d] - points[b, d]) * (targets[j, d] - targets[k, d])
                if gain > _ROUNDING:
                    indices[a], indices[b] = k, j
                    owner[j], owner[k] = b, a
                    swaps += 1
        if swaps == 0:
            break


@njit(cache=True)
def shortlists(points, targets, prices, indices, tree, size):
    """The cheapest targets of every point.

    Neighbouring points are searched together: with the linear bound on what their present targets cost them, a node of
    the tree is skipped if no target in it can be among the cheapest of any of them.

    Returns:
        nearest [N, K] targets in no order (repeated where there are fewer), limits [N] which no target outside the list
        undercuts, least [N] the value of the cheapest. K is `size` or, if less, N.
    """
    order, bounds, right, span = tree
    count, dim = points.shape
    size = min(size, count)
    nearest = np.empty((count, size), np.int64)
    limits, least = np.empty(count), np.empty(count)
    own = np.empty(count)
    for i in range(count):
        own[i] = _value(points, i, targets, indices[i], prices)
    reach = _reach(points, targets, prices, tree, own, size)

    groups, starts = median_split(points, max(1, count // _LEAF))
    sorted_targets, sorted_prices = targets[order], prices[order]
    leaves, nodes = np.empty(len(bounds), np.int64), np.empty(128, np.int64)
    found, values = np.empty(count, np.int64), np.empty(count)
    centre, aim = np.empty(dim), np.empty(dim)
    sorted_values = np.empty(size)
    for g in range(len(starts) - 1):
        group = groups[starts[g] : starts[g + 1]]
        # As functions of the point p: own(p) <= top - aim.(p - centre) in the group.
        centre[:], aim[:] = 0.0, 0.0
        for i in group:
            for d in range(dim):
                centre[d] += points[i, d] / len(group)
                aim[d] += targets[indices[i], d] / len(group)
        radius, top = 0.0, -np.inf
        for i in group:
            height, distance = own[i], 0.0
            for d in range(dim):
                step = points[i, d] - centre[d]
                distance += step * step
                height += aim[d] * step
            radius, top = max(radius, distance), max(top, height)
        radius = np.sqrt(radius)

        leaf_count, candidates, depth = 0, 0, 1
        nodes[0] = 0
        while depth:
            depth -= 1
            node = nodes[depth]
            value, from_aim, from_slope = -bounds[node, 2 * dim + 1] - top, 0.0, 0.0
            for d in range(dim):
                value -= centre[d] * bounds[node, d]
                from_aim += (bounds[node, d] - aim[d]) ** 2
                from_slope += (centre[d] - bounds[node, dim + d]) ** 2
            extent = bounds[node, 2 * dim]
            if value - radius * np.sqrt(from_aim) - extent * np.sqrt(from_slope) - radius * extent > reach:
                continue
            if right[node] < 0:
                leaves[leaf_count] = node
                leaf_count += 1
                candidates += span[node, 1] - span[node, 0]
            else:
                nodes[depth], nodes[depth + 1] = right[node], node + 1
                depth += 2

        for i in group:
            if candidates > _MOST_CANDIDATES:
                _search(points, i, targets, prices, tree, nearest[i], sorted_values, np.inf)
                least[i], limits[i] = sorted_values[0], sorted_values[size - 1] - _ROUNDING
                continue
            matches = 0
            least[i], limits[i] = own[i], own[i] + reach
            for leaf in leaves[:leaf_count]:
                for q in range(span[leaf, 0], span[leaf, 1]):
                    value = -sorted_prices[q]
                    for d in range(dim):
                        value -= points[i, d] * sorted_targets[q, d]
                    if value <= limits[i]:
                        found[matches], values[matches] = order[q], value
                        matches += 1
                        least[i] = min(least[i], value)
            if matches > size:
                by_value = np.arange(matches)
                _select(values, by_value, 0, matches, size)
                for c in range(size, matches):
                    limits[i] = min(limits[i], values[by_value[c]])
                for c in range(size):
                    nearest[i, c] = found[by_value[c]]
            else:
                nearest[i, :matches] = found[:matches]
                nearest[i, matches:] = indices[i]
    return nearest, limits, least


@njit(cache=True)
def _reach(points, targets, prices, tree, own, size):
    """How much dearer than its own a target may be to stand in about half of the shortlists of this size."""
    count = len(points)
    nearest, values = np.empty(size, np.int64), np.empty(size)
    samples = np.empty(min(count, _SAMPLES))
    for s in range(len(samples)):
        i = s * count // len(samples)
        _search(points, i, targets, prices, tree, nearest, values, np.inf)
        samples[s] = values[size - 1] - own[i]
    return max(0.0, np.median(samples))


@njit(cache=True)
def free(points, targets, prices, indices, owner, nearest, limits, epsilon):
    """Take from every point the target by which it loses more than epsilon."""
    for i in range(len(points)):
        least = limits[i]
        for j in nearest[i]:
            least = min(least, _value(points, i, targets, j, prices))
        if _value(points, i, targets, indices[i], prices) > least + epsilon:
            owner[indices[i]] = -1
            indices[i] = -1


@njit(cache=True)
def bid(points, targets, prices, indices, owner, tree, nearest, limits, epsilon):
    """Auction (Bertsekas 1988): each point without a target takes its cheapest and raises its cost to that of the second
    cheapest plus epsilon, until all have one."""
    count, size = nearest.shape
    values = np.empty(size)
    waiting = np.empty(count, np.int64)
    head, length = 0, 0
    for i in range(count):
        if indices[i] < 0:
            waiting[length] = i
            length += 1
    while length:
        i = waiting[head]
        head = (head + 1) % count
        length -= 1
        while True:
            first, second, dearest, best = np.inf, np.inf, -np.inf, -1
            for j in nearest[i]:
                value = _value(points, i, targets, j, prices)
                dearest = max(dearest, value)
                if value < first:
                    first, second, best = value, first, j
                elif value < second and j != best:
                    second = value
            if first <= limits[i]:
                break
            _search(points, i, targets, prices, tree, nearest[i], values, dearest)
            limits[i] = values[size - 1]
        prices[best] -= min(second, limits[i]) - first + epsilon
        previous = owner[best]
        owner[best], indices[i] = i, best
        if previous >= 0:
            indices[previous] = -1
            waiting[(head + length) % count] = previous
            length += 1


@njit(cache=True)
def augment(points, targets, prices, indices, owner, tree, nearest, limits):
    """Give every point without a target one, by the cheapest chain of reassignments (Jonker and Volgenant 1987).

    The chains are found by Dijkstra's algorithm over the shortlists. A point whose list ends before the chain does enters
    the queue a second time, at its limit, and gets a list twice as long there, in the end all targets. The points that have
    a target must have their cheapest.

    Returns:
        [N] the dual potentials of the points; with the prices they are feasible and prove the assignment optimal.
    """
    count, size = nearest.shape
    duals = limits.copy()
    for i in range(count):
        for j in nearest[i]:
            duals[i] = min(duals[i], _value(points, i, targets, j, prices))
    lists, used = np.concatenate((np.arange(count), nearest.copy().reshape(-1))), count + count * size
    first, length = count + np.arange(count) * size, np.full(count, size)
    distance, previous = np.empty(count), np.empty(count, np.int64)
    reached, settled = np.full(count, -1, np.int64), np.full(count, -1, np.int64)  # the last chain that did
    entered = np.empty(count)  # of each point, its distance from the start of the chain
    chain = np.empty(count, np.int64)
    for start in range(count):
        if indices[start] >= 0:
            continue
        queue = [(0.0, 0)]
        queue.clear()
        done, reach, i, goal = 0, 0.0, start, -1
        entered[start] = 0.0
        while goal < 0:
            offset = entered[i] - duals[i]
            for q in range(first[i], first[i] + length[i]):
                j = lists[q]
                if settled[j] == start:
                    continue
                way = max(reach, offset + _value(points, i, targets, j, prices))
                if reached[j] == start and way >= distance[j]:
                    continue
                reached[j], distance[j], previous[j] = start, way, i
                if way <= reach and owner[j] < 0:  # nothing can be nearer; ends ties at once
                    goal = j
                    break
                heapq.heappush(queue, (way, j))
            if goal >= 0:
                break
            if length[i] < count:
                heapq.heappush(queue, (max(reach, offset + limits[i]), -1 - i))
            while True:
                way, j = heapq.heappop(queue)
                if j < 0 or (settled[j] != start and way <= distance[j]):
                    break
            if j < 0:
                i = -1 - j
                length[i] *= 2
                if length[i] > min(count, _LONGEST):
                    first[i], length[i] = 0, count
                    continue
                first[i] = used
                used += length[i]
                if used > len(lists):
                    longer = np.empty(2 * used, np.int64)
                    longer[: first[i]] = lists[: first[i]]
                    lists = longer
                values = np.empty(length[i])
                _search(points, i, targets, prices, tree, lists[first[i] : used], values, np.inf)
                limits[i] = values[-1]
                continue
            reach = way
            if owner[j] < 0:
                goal = j
                break
            settled[j] = start
            chain[done] = j
            done += 1
            i = owner[j]
            entered[i] = reach
        for q in range(done):
            j = chain[q]
            prices[j] -= reach - distance[j]
            duals[owner[j]] += reach - distance[j]
        duals[start] += reach
        j = goal
        while True:
            i = previous[j]
            owner[j] = i
            indices[i], j = j, indices[i]
            if i == start:
                break
    return duals
