"""The CPU renderer where numba is installed: compiled, on all cores, and differentiable.

The same semantics as the other backends in the usual two steps (Kerbl et al. 2023): Gaussians are projected to the image
plane; then they are sorted by depth, listed by tile, and blended front to back. A tile belongs to one thread, and the
gradient of one splat in one tile has a slot of its own, so nothing is ever added to from two threads and results do not
depend on how many there are.

The innermost loops run over the pixels of a tile, without branches and in float32, so that the compiler makes vectors of
them. The backward pass replays the blending from the front, which needs no memory of it (see `_blend_backward`).
"""

from __future__ import annotations

import math

import numba
import numpy as np
import torch
from torch import Tensor

from ..gaussians import Gaussians
from .cameras import Cameras
from .ewa import ALPHA_CUT, ALPHA_MAX, LOW_PASS, MARGIN, NEAR

# Starting numba's threads sets OpenMP's number for torch as well: a training process that was given one core would from its first
# picture on fight its neighbours for theirs.
_threads = torch.get_num_threads()
numba.get_num_threads()
torch.set_num_threads(_threads)

# What numba keeps beside this file names other functions by their module, so that what the extension's copy of it compiled (bl_ext...)
# could not be loaded anywhere else: only this package's own is kept.
_CACHED = __name__ == "generator.render.compiled"
# One vector wide: splats of a few pixels then waste the fewest lanes.
_WIDE, _HIGH = 8, 16
_PIXELS = _WIDE * _HIGH
# A tile none of whose pixels lets through more is finished (Kerbl et al. 2023, appendix C, do so pixel by pixel).
_TRANSMITTANCE_END = 1e-4
_LOOK = 8  # splats between two looks whether a tile is finished

# Columns of a splat, and of its gradient.
_X, _Y, _XX, _XY, _YY, _OPACITY, _RED, _GREEN, _BLUE, _DEPTH = range(10)
_COLUMNS = 10

_f = np.float32
_HALF, _ONE = _f(0.5), _f(1)
# Unsigned, so that no index is taken for one that counts from the end: such a check keeps loops from becoming vectors.
_u = np.uint64
_1, _2, _3, _4, _5 = (_u(part * _PIXELS) for part in range(1, 6))
_LOG2_E = _f(1 / math.log(2))
_CUT, _MAX, _LOW, _NEAR = _f(ALPHA_CUT), _f(ALPHA_MAX), _f(LOW_PASS), _f(NEAR)

# Sums may be reordered, which is what vectors need; NaN and infinity keep their meaning.
_REORDERED = {"reassoc", "contract", "nsz"}


@numba.njit(inline="always")
def _exp(x):
    """e^x of x <= 0, float32, to 1e-7 of its value: a polynomial for the fraction of the exponent, its bits for the rest."""
    t = max(x * _LOG2_E, _f(-126))
    whole = np.int32(t)  # towards zero, so the fraction lies in -1..0
    f = t - _f(whole)
    power = _f(0.0009449311573128979) * f + _f(0.009205860321465253)
    power = power * f + _f(0.05529740625101641)
    power = power * f + _f(0.24018015732259468)
    power = power * f + _f(0.6931437224722448)
    power = power * f + _ONE
    return power * np.int32((whole + np.int32(127)) << np.int32(23)).view(np.float32)


# --- projection -------------------------------------------------------------------------------------------------------


@numba.njit(cache=_CACHED, error_model="numpy")
def _linearised(x, y, z, viewmat, K, width, height, w, a, b, c):
    """What both directions need of a splat at (x, y, z) in camera space with the unit quaternion (w, a, b, c).

    Returns:
        the rows of J W (6), of J W R (6), and x / z, y / z, as they are and as J takes them, bounded. With the scales S
        the covariance on the image is J W R S (J W R S)^T (Zwicker et al. 2001).
    """
    two = _f(2)
    r00, r01, r02 = _ONE - two * (b * b + c * c), two * (a * b - w * c), two * (a * c + w * b)
    r10, r11, r12 = two * (a * b + w * c), _ONE - two * (a * a + c * c), two * (b * c - w * a)
    r20, r21, r22 = two * (a * c - w * b), two * (b * c + w * a), _ONE - two * (a * a + b * b)
    fx, fy, cx, cy = K[0, 0], K[1, 1], K[0, 2], K[1, 2]
    u, v = x / z, y / z
    margin_x, margin_y = _f(MARGIN) * width / fx, _f(MARGIN) * height / fy
    us = min(max(u, -cx / fx - margin_x), (width - cx) / fx + margin_x)
    vs = min(max(v, -cy / fy - margin_y), (height - cy) / fy + margin_y)
    m = viewmat
    # Rows of J times the view's rotation.
    j00, j02, j11, j12 = fx / z, -fx * us / z, fy / z, -fy * vs / z
    a0, a1, a2 = j00 * m[0, 0] + j02 * m[2, 0], j00 * m[0, 1] + j02 * m[2, 1], j00 * m[0, 2] + j02 * m[2, 2]
    b0, b1, b2 = j11 * m[1, 0] + j12 * m[2, 0], j11 * m[1, 1] + j12 * m[2, 1], j11 * m[1, 2] + j12 * m[2, 2]
    # Times the Gaussian's rotation.
    p0, p1, p2 = a0 * r00 + a1 * r10 + a2 * r20, a0 * r01 + a1 * r11 + a2 * r21, a0 * r02 + a1 * r12 + a2 * r22
    o0, o1, o2 = b0 * r00 + b1 * r10 + b2 * r20, b0 * r01 + b1 * r11 + b2 * r21, b0 * r02 + b1 * r12 + b2 * r22
    return a0, a1, a2, b0, b1, b2, p0, p1, p2, o0, o1, o2, u, v, us, vs


@numba.njit(cache=_CACHED, error_model="numpy")
def _unit(w, a, b, c):
    """A quaternion of unit length, and what it was multiplied by."""
    inverse = _ONE / max(_f(math.sqrt(w * w + a * a + b * b + c * c)), _f(1e-12))
    return w * inverse, a * inverse, b * inverse, c * inverse, inverse


@numba.njit(parallel=True, cache=_CACHED, error_model="numpy")
def _project(means, quaternions, scales, opacities, viewmat, K, width, height):
    """means2d [N, 2], conics [N, 3], depths [N], boxes [N, 4] (first column and row, last ones + 1; empty if unseen), radii [N]."""
    count = means.shape[0]
    means2d, conics = np.zeros((count, 2), np.float32), np.zeros((count, 3), np.float32)
    depths, boxes, radii = np.empty(count, np.float32), np.zeros((count, 4), np.int32), np.zeros(count, np.float32)
    m = viewmat
    for i in numba.prange(count):
        px, py, pz = means[i, 0], means[i, 1], means[i, 2]
        x = m[0, 0] * px + m[0, 1] * py + m[0, 2] * pz + m[0, 3]
        y = m[1, 0] * px + m[1, 1] * py + m[1, 2] * pz + m[1, 3]
        z = m[2, 0] * px + m[2, 1] * py + m[2, 2] * pz + m[2, 3]
        depths[i] = z
        if not z > _NEAR:
            continue
        s0, s1, s2 = scales[i, 0], scales[i, 1], scales[i, 2]
        qw, qa, qb, qc, _ = _unit(quaternions[i, 0], quaternions[i, 1], quaternions[i, 2], quaternions[i, 3])
        _, _, _, _, _, _, p0, p1, p2, o0, o1, o2, u, v, _, _ = _linearised(x, y, z, m, K, _f(width), _f(height), qw, qa, qb, qc)
        p0, p1, p2, o0, o1, o2 = p0 * s0, p1 * s1, p2 * s2, o0 * s0, o1 * s1, o2 * s2
        a, b, c = p0 * p0 + p1 * p1 + p2 * p2 + _LOW, p0 * o0 + p1 * o1 + p2 * o2, o0 * o0 + o1 * o1 + o2 * o2 + _LOW
        determinant = max(a * c - b * b, _f(1e-12))
        conics[i, 0], conics[i, 1], conics[i, 2] = c / determinant, -b / determinant, a / determinant
        column, row = K[0, 0] * u + K[0, 2], K[1, 1] * v + K[1, 2]
        means2d[i, 0], means2d[i, 1] = column, row
        if not opacities[i] > _CUT:
            continue
        # Outside of this box alpha is below the cut; pixel k is sampled at k + 0.5.
        reach = math.sqrt(2 * math.log(opacities[i] / _CUT))
        across, down = reach * math.sqrt(a), reach * math.sqrt(c)
        first, last = math.ceil(column - across - _HALF), math.floor(column + across - _HALF) + 1
        top, bottom = math.ceil(row - down - _HALF), math.floor(row + down - _HALF) + 1
        if first < width and last > 0 and top < height and bottom > 0 and last > first and bottom > top:
            boxes[i, 0], boxes[i, 1] = int(max(first, 0)), int(max(top, 0))
            boxes[i, 2], boxes[i, 3] = int(min(last, width)), int(min(bottom, height))
            radii[i] = max(across, down)
    return means2d, conics, depths, boxes, radii


@numba.njit(parallel=True, cache=_CACHED, error_model="numpy")
def _project_backward(means, quaternions, scales, viewmat, K, width, height, boxes, conics, grad_means2d, grad_conics, grad_depths):
    """Gradients of means, quaternions and scales; those of splats that are not seen are zero."""
    count = means.shape[0]
    grad_means, grad_quaternions = np.zeros((count, 3), np.float32), np.zeros((count, 4), np.float32)
    grad_scales = np.zeros((count, 3), np.float32)
    m = viewmat
    two = _f(2)
    for i in numba.prange(count):
        if boxes[i, 2] <= boxes[i, 0]:
            continue
        px, py, pz = means[i, 0], means[i, 1], means[i, 2]
        x = m[0, 0] * px + m[0, 1] * py + m[0, 2] * pz + m[0, 3]
        y = m[1, 0] * px + m[1, 1] * py + m[1, 2] * pz + m[1, 3]
        z = m[2, 0] * px + m[2, 1] * py + m[2, 2] * pz + m[2, 3]
        s0, s1, s2 = scales[i, 0], scales[i, 1], scales[i, 2]
        w, a, b, c, inverse = _unit(quaternions[i, 0], quaternions[i, 1], quaternions[i, 2], quaternions[i, 3])
        a0, a1, a2, b0, b1, b2, m0, m1, m2, n0, n1, n2, u, v, us, vs = _linearised(x, y, z, m, K, _f(width), _f(height), w, a, b, c)
        p0, p1, p2, o0, o1, o2 = m0 * s0, m1 * s1, m2 * s2, n0 * s0, n1 * s1, n2 * s2
        # d(C^-1) = -C^-1 dC C^-1, with the conic's off-diagonal entry standing for both.
        A, B, C = conics[i, 0], conics[i, 1], conics[i, 2]
        gA, gB, gC = grad_conics[i, 0], _HALF * grad_conics[i, 1], grad_conics[i, 2]
        t00, t01, t10, t11 = A * gA + B * gB, A * gB + B * gC, B * gA + C * gB, B * gB + C * gC
        ga, gb, gc = -(t00 * A + t01 * B), -(t00 * B + t01 * C), -(t10 * B + t11 * C)
        # C = half half^T + low-pass.
        g0, g1, g2 = two * (ga * p0 + gb * o0), two * (ga * p1 + gb * o1), two * (ga * p2 + gb * o2)
        h0, h1, h2 = two * (gb * p0 + gc * o0), two * (gb * p1 + gc * o1), two * (gb * p2 + gc * o2)
        grad_scales[i, 0], grad_scales[i, 1], grad_scales[i, 2] = g0 * m0 + h0 * n0, g1 * m1 + h1 * n1, g2 * m2 + h2 * n2
        # Of the products with the scales taken out.
        g0, g1, g2, h0, h1, h2 = g0 * s0, g1 * s1, g2 * s2, h0 * s0, h1 * s1, h2 * s2
        # Of the Gaussian's rotation: rows^T times the gradient.
        r00, r01, r02 = a0 * g0 + b0 * h0, a0 * g1 + b0 * h1, a0 * g2 + b0 * h2
        r10, r11, r12 = a1 * g0 + b1 * h0, a1 * g1 + b1 * h1, a1 * g2 + b1 * h2
        r20, r21, r22 = a2 * g0 + b2 * h0, a2 * g1 + b2 * h1, a2 * g2 + b2 * h2
        qw = two * (a * (r21 - r12) + b * (r02 - r20) + c * (r10 - r01))
        qa = two * (b * (r01 + r10) + c * (r02 + r20) + w * (r21 - r12) - two * a * (r11 + r22))
        qb = two * (a * (r01 + r10) + c * (r12 + r21) + w * (r02 - r20) - two * b * (r00 + r22))
        qc = two * (a * (r02 + r20) + b * (r12 + r21) + w * (r10 - r01) - two * c * (r00 + r11))
        along = w * qw + a * qa + b * qb + c * qc
        grad_quaternions[i, 0], grad_quaternions[i, 1] = (qw - w * along) * inverse, (qa - a * along) * inverse
        grad_quaternions[i, 2], grad_quaternions[i, 3] = (qb - b * along) * inverse, (qc - c * along) * inverse
        # Of the Jacobian: the gradient of its product with the view's rotation is g R^T, h R^T.
        q00, q01, q02 = _ONE - two * (b * b + c * c), two * (a * b - w * c), two * (a * c + w * b)
        q10, q11, q12 = two * (a * b + w * c), _ONE - two * (a * a + c * c), two * (b * c - w * a)
        q20, q21, q22 = two * (a * c - w * b), two * (b * c + w * a), _ONE - two * (a * a + b * b)
        k0, k1, k2 = g0 * q00 + g1 * q01 + g2 * q02, g0 * q10 + g1 * q11 + g2 * q12, g0 * q20 + g1 * q21 + g2 * q22
        l0, l1, l2 = h0 * q00 + h1 * q01 + h2 * q02, h0 * q10 + h1 * q11 + h2 * q12, h0 * q20 + h1 * q21 + h2 * q22
        d00 = k0 * m[0, 0] + k1 * m[0, 1] + k2 * m[0, 2]
        d02 = k0 * m[2, 0] + k1 * m[2, 1] + k2 * m[2, 2]
        d11 = l0 * m[1, 0] + l1 * m[1, 1] + l2 * m[1, 2]
        d12 = l0 * m[2, 0] + l1 * m[2, 1] + l2 * m[2, 2]
        fx, fy = K[0, 0], K[1, 1]
        gx = grad_means2d[i, 0] * fx / z
        gy = grad_means2d[i, 1] * fy / z
        gz = grad_depths[i] - (gx * u + gy * v) - (fx * d00 + fy * d11 - fx * us * d02 - fy * vs * d12) / (z * z)
        if us == u:
            gx -= fx * d02 / (z * z)
            gz += fx * d02 * u / (z * z)
        if vs == v:
            gy -= fy * d12 / (z * z)
            gz += fy * d12 * v / (z * z)
        grad_means[i, 0] = m[0, 0] * gx + m[1, 0] * gy + m[2, 0] * gz
        grad_means[i, 1] = m[0, 1] * gx + m[1, 1] * gy + m[2, 1] * gz
        grad_means[i, 2] = m[0, 2] * gx + m[1, 2] * gy + m[2, 2] * gz
    return grad_means, grad_quaternions, grad_scales


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx, means, quaternions, scales, opacities, viewmat, K, width, height):
        tensors = (means, quaternions, scales, opacities, viewmat, K)
        means, quaternions, scales, opacities, viewmat, K = (tensor.detach().contiguous().numpy() for tensor in tensors)
        results = _project(means, quaternions, scales, opacities, viewmat, K, width, height)
        ctx.inputs = (means, quaternions, scales, viewmat, K, width, height, results[3], results[1])
        means2d, conics, depths, boxes, radii = map(torch.from_numpy, results)
        ctx.mark_non_differentiable(boxes, radii)
        return means2d, conics, depths, boxes, radii

    @staticmethod
    def backward(ctx, *grads):
        grads = _project_backward(*ctx.inputs, *(grad.contiguous().numpy() for grad in grads[:3]))
        return *(torch.from_numpy(grad) for grad in grads), None, None, None, None, None


# --- blending ---------------------------------------------------------------------------------------------------------


@numba.njit(cache=_CACHED)
def _by_depth(bits, boxes):
    """Indices [M] of what is seen, nearest first, equal depths in their own order: a radix sort of the depths' bits, 11 at a time.

    Depths are positive, so their bits sort as they do.
    """
    order, other = np.empty(len(bits), np.int32), np.empty(len(bits), np.int32)
    places = np.zeros((3, 2049), np.int32)
    count = 0
    for i in range(len(bits)):
        if boxes[i, 2] > boxes[i, 0]:
            order[count] = i
            count += 1
            for digit in range(3):
                places[digit, (bits[i] >> np.uint32(11 * digit) & np.uint32(2047)) + np.uint32(1)] += 1
    for digit in range(3):
        place = places[digit]
        for value in range(2048):
            place[value + 1] += place[value]
        for k in range(count):
            value = bits[order[k]] >> np.uint32(11 * digit) & np.uint32(2047)
            other[place[value]] = order[k]
            place[value] += 1
        order, other = other, order
    return order[:count]


@numba.njit(parallel=True, cache=_CACHED)
def _gather(order, means2d, conics, opacities, colors, depths, boxes, columns, rows):
    """Splats [M, 10] and boxes [M, 4] in the order given, and the splats of each tile: `starts` [T + 1] in `entries` [P]."""
    count = len(order)
    splats, near = np.empty((count, _COLUMNS), np.float32), np.empty((count, 4), np.int32)
    starts = np.zeros(columns * rows + 1, np.int64)
    for k in numba.prange(count):
        i = order[k]
        splats[k, _X], splats[k, _Y] = means2d[i, 0], means2d[i, 1]
        splats[k, _XX], splats[k, _XY], splats[k, _YY] = conics[i, 0], conics[i, 1], conics[i, 2]
        splats[k, _OPACITY], splats[k, _DEPTH] = opacities[i], depths[i]
        splats[k, _RED], splats[k, _GREEN], splats[k, _BLUE] = colors[i, 0], colors[i, 1], colors[i, 2]
        for side in range(4):
            near[k, side] = boxes[i, side]
    for k in range(count):
        for row in range(near[k, 1] // _HIGH, (near[k, 3] - 1) // _HIGH + 1):
            for column in range(near[k, 0] // _WIDE, (near[k, 2] - 1) // _WIDE + 1):
                starts[row * columns + column + 1] += 1
    for tile in range(columns * rows):
        starts[tile + 1] += starts[tile]
    fill = starts[:-1].copy()
    entries = np.empty(starts[-1], np.int32)
    for k in range(count):
        for row in range(near[k, 1] // _HIGH, (near[k, 3] - 1) // _HIGH + 1):
            for column in range(near[k, 0] // _WIDE, (near[k, 2] - 1) // _WIDE + 1):
                tile = row * columns + column
                entries[fill[tile]] = k
                fill[tile] += 1
    return splats, near, starts, entries


@numba.njit(cache=_CACHED)
def _mixed(index, count, threads):
    """The tile to take as number `index`: tiles next to each other fall to different threads, and so an object to all."""
    share = (count + threads - 1) // threads
    return index % share * threads + index // share


@numba.njit(parallel=True, cache=_CACHED, fastmath=_REORDERED, error_model="numpy")
def _blend(splats, boxes, starts, entries, width, height, threads):
    """rgb and depth [H, W, 4] weighted by alpha, transmittance [H, W], and where each tile's list was left [T]."""
    columns, rows = (width + _WIDE - 1) // _WIDE, (height + _HIGH - 1) // _HIGH
    image, through = np.zeros((height, width, 4), np.float32), np.ones((height, width), np.float32)
    ends = starts[:-1].copy()
    for index in numba.prange((columns * rows + threads - 1) // threads * threads):
        tile = _mixed(index, columns * rows, threads)
        if tile >= columns * rows or starts[tile] == starts[tile + 1]:
            continue
        left, top = tile % columns * _WIDE, tile // columns * _HIGH
        wide, high = min(_WIDE, width - left), min(_HIGH, height - top)
        # One array, so that the compiler knows its parts apart: transmittance, then red, green, blue and depth.
        state = np.zeros(5 * _PIXELS, np.float32)
        for row in range(high):
            for column in range(wide):
                state[row * _WIDE + column] = _ONE
        x0, y0 = _f(left) + _HALF, _f(top) + _HALF
        end = starts[tile + 1]
        for e in range(starts[tile], starts[tile + 1]):
            k = entries[e]
            splat = splats[k]
            mx, my, opacity = splat[_X] - x0, splat[_Y] - y0, splat[_OPACITY]
            xx, xy, yy = -_HALF * splat[_XX], -splat[_XY], -_HALF * splat[_YY]
            red, green, blue, depth = splat[_RED], splat[_GREEN], splat[_BLUE], splat[_DEPTH]
            first, last = max(boxes[k, 1] - top, 0) * _WIDE, min(boxes[k, 3] - top, _HIGH) * _WIDE
            for p in range(_u(first), _u(last)):
                q = np.int32(p)
                dx, dy = _f(q & np.int32(_WIDE - 1)) - mx, _f(q // np.int32(_WIDE)) - my
                power = min(dx * (xx * dx + xy * dy) + yy * dy * dy, _f(0))
                alpha = min(opacity * _exp(power), _MAX)
                alpha = alpha if alpha >= _CUT else _f(0)
                weight = alpha * state[p]
                state[p] -= weight
                state[p + _1] += weight * red
                state[p + _2] += weight * green
                state[p + _3] += weight * blue
                state[p + _4] += weight * depth
            if (e - starts[tile]) % _LOOK == _LOOK - 1:
                # The fourth powers' sum stands for the largest, which does not become a vector.
                remaining = _f(0)
                for p in range(_1):
                    square = state[p] * state[p]
                    remaining += square * square
                if remaining < _f(_TRANSMITTANCE_END**4):
                    end = e + 1
                    break
        ends[tile] = end
        for row in range(high):
            for column in range(wide):
                p = row * _WIDE + column
                through[top + row, left + column] = state[p]
                for channel in range(4):
                    image[top + row, left + column, channel] = state[p + (channel + 1) * _PIXELS]
    return image, through, ends


@numba.njit(parallel=True, cache=_CACHED, fastmath=_REORDERED, error_model="numpy")
def _blend_backward(splats, boxes, starts, ends, entries, image, through, grad_rgb, grad_alpha, grad_depth, threads):
    """Gradients [P, 10] of each splat in each tile, by replaying the blending.

    With T the transmittance in front of splat i and R what lies behind it, a pixel is C = front + T alpha_i c_i + R, and R
    is proportional to 1 - alpha_i; so dC/dalpha_i = T c_i - R / (1 - alpha_i), where R = C - front - T alpha_i c_i.
    Everything is needed only as its product with the pixel's gradient: one number instead of four.
    """
    height, width = through.shape
    columns, rows = (width + _WIDE - 1) // _WIDE, (height + _HIGH - 1) // _HIGH
    slots = np.zeros((len(entries), _COLUMNS), np.float32)
    for index in numba.prange((columns * rows + threads - 1) // threads * threads):
        tile = _mixed(index, columns * rows, threads)
        if tile >= columns * rows or starts[tile] == ends[tile]:
            continue
        left, top = tile % columns * _WIDE, tile // columns * _HIGH
        # Transmittance; minus what is still to come, in units of the loss; the gradients of red, green, blue and depth.
        state = np.zeros(6 * _PIXELS, np.float32)
        for row in range(min(_HIGH, height - top)):
            for column in range(min(_WIDE, width - left)):
                p = row * _WIDE + column
                state[p] = _ONE
                total = through[top + row, left + column] * grad_alpha[top + row, left + column]
                for channel in range(4):
                    gradient = grad_depth[top + row, left + column] if channel == 3 else grad_rgb[top + row, left + column, channel]
                    state[p + (channel + 2) * _PIXELS] = gradient
                    total -= image[top + row, left + column, channel] * gradient
                state[p + _1] = total
        x0, y0 = _f(left) + _HALF, _f(top) + _HALF
        for e in range(starts[tile], ends[tile]):
            k = entries[e]
            splat = splats[k]
            mx, my, opacity = splat[_X] - x0, splat[_Y] - y0, splat[_OPACITY]
            xx, xy, yy = splat[_XX], splat[_XY], splat[_YY]
            red, green, blue, depth = splat[_RED], splat[_GREEN], splat[_BLUE], splat[_DEPTH]
            first, last = max(boxes[k, 1] - top, 0) * _WIDE, min(boxes[k, 3] - top, _HIGH) * _WIDE
            sum_x = sum_y = sum_xx = sum_xy = sum_yy = sum_o = sum_r = sum_g = sum_b = sum_d = _f(0)
            for p in range(_u(first), _u(last)):
                q = np.int32(p)
                dx, dy = _f(q & np.int32(_WIDE - 1)) - mx, _f(q // np.int32(_WIDE)) - my
                power = min(-_HALF * (xx * dx * dx + yy * dy * dy) - xy * dx * dy, _f(0))
                falloff = _exp(power)
                raw = opacity * falloff
                alpha = min(raw, _MAX)
                alpha = alpha if alpha >= _CUT else _f(0)
                before = state[p]
                weight = alpha * before
                g0, g1, g2, g3 = state[p + _2], state[p + _3], state[p + _4], state[p + _5]
                worth = red * g0 + green * g1 + blue * g2 + depth * g3
                rest = state[p + _1] + weight * worth
                state[p] = before - weight
                state[p + _1] = rest
                sum_r += weight * g0
                sum_g += weight * g1
                sum_b += weight * g2
                sum_d += weight * g3
                gradient = before * worth + rest / (_ONE - alpha)
                gradient = gradient if (alpha > _f(0)) & (raw <= _MAX) else _f(0)
                sum_o += gradient * falloff
                gradient *= alpha
                moved_x, moved_y = gradient * dx, gradient * dy
                sum_x += moved_x
                sum_y += moved_y
                sum_xx += moved_x * dx
                sum_xy += moved_x * dy
                sum_yy += moved_y * dy
            slot = slots[e]
            slot[_X], slot[_Y] = xx * sum_x + xy * sum_y, yy * sum_y + xy * sum_x
            slot[_XX], slot[_XY], slot[_YY] = -_HALF * sum_xx, -sum_xy, -_HALF * sum_yy
            slot[_OPACITY], slot[_DEPTH] = sum_o, sum_d
            slot[_RED], slot[_GREEN], slot[_BLUE] = sum_r, sum_g, sum_b
    return slots


@numba.njit(cache=_CACHED)
def _scatter(slots, entries, order, count):
    """The slots of every splat added up, [N, 10] in the order of the input."""
    total = np.zeros((count, _COLUMNS), np.float32)
    for e in range(len(entries)):
        i = order[entries[e]]
        for column in range(_COLUMNS):
            total[i, column] += slots[e, column]
    return total


class _Composite(torch.autograd.Function):
    @staticmethod
    def forward(ctx, means2d, conics, depths, opacities, colors, boxes, width, height):
        tensors = (means2d, conics, opacities, colors, depths, boxes)
        means2d, conics, opacities, colors, depths, boxes = (tensor.detach().contiguous().numpy() for tensor in tensors)
        order = _by_depth(depths.view(np.uint32), boxes)
        columns, rows = -(-width // _WIDE), -(-height // _HIGH)
        splats, near, starts, entries = _gather(order, means2d, conics, opacities, colors, depths, boxes, columns, rows)
        threads = numba.get_num_threads()
        image, through, ends = _blend(splats, near, starts, entries, width, height, threads)
        ctx.saved = (splats, near, starts, ends, entries, image, through)
        ctx.order, ctx.count = order, len(means2d)
        ctx.set_materialize_grads(False)
        image = torch.from_numpy(image)
        return image[..., :3], torch.from_numpy(1 - through), image[..., 3]

    @staticmethod
    def backward(ctx, grad_rgb, grad_alpha, grad_depth):
        splats, near, starts, ends, entries, image, through = ctx.saved
        grad_rgb = np.zeros((*through.shape, 3), np.float32) if grad_rgb is None else grad_rgb.contiguous().numpy()
        grad_alpha, grad_depth = (
            np.zeros_like(through) if grad is None else grad.contiguous().numpy() for grad in (grad_alpha, grad_depth)
        )
        threads = numba.get_num_threads()
        slots = _blend_backward(splats, near, starts, ends, entries, image, through, grad_rgb, grad_alpha, grad_depth, threads)
        total = torch.from_numpy(_scatter(slots, entries, ctx.order, ctx.count))
        return total[:, :2], total[:, 2:5], total[:, _DEPTH], total[:, _OPACITY], total[:, 6:9], None, None, None


def render_views(gaussians: Gaussians, cameras: Cameras) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """All views of float32 Gaussians: premultiplied rgb [V, H, W, 3], alpha [V, H, W], alpha-weighted depth [V, H, W], means2d
    [V, N, 2] and radii [V, N], the last without gradients."""
    size, g = (cameras.width, cameras.height), gaussians
    views = zip(cameras.viewmats.float(), cameras.Ks.float(), strict=True)
    projected = [_Project.apply(g.means, g.quaternions, g.scales, g.opacities, viewmat, K, *size) for viewmat, K in views]
    means2d = torch.stack([means for means, *_ in projected])
    images = [
        _Composite.apply(means, conics, depths, g.opacities, g.colors, boxes, *size)
        for means, (_, conics, depths, boxes, _) in zip(means2d, projected, strict=True)
    ]
    rgb, alpha, depth = (torch.stack(parts) for parts in zip(*images, strict=True))
    return rgb, alpha, depth, means2d, torch.stack([radii for *_, radii in projected])
