"""Published CARE in plain numpy, one sample and one token at a time, from its description alone."""

import numpy as np
from scipy.linalg import sqrtm
from scipy.spatial.distance import cdist


def kernel(a, b):
    distances = np.minimum(cdist(a, b, "sqeuclidean"), 1e6)
    sigma = np.sqrt(0.5 * np.median(distances[distances > 0]))
    return np.exp(-distances / (2 * sigma**2)), distances


def best(tokens, scores, k):
    span = scores.max() - scores.min()
    scores = (scores - scores.min()) / span if span else scores * 0
    order = sorted(range(len(tokens)), key=lambda i: (-scores[i], i))
    return tokens[order[:k]].mean(axis=0)


def visual_row(image, text, variant):
    if variant == "variance":
        scores = np.array([np.var(token) for token in image])
    else:
        centring = np.eye(len(text)) - 1 / len(text)
        scores = np.array([np.linalg.norm(row) ** 2 for row in kernel(image, text)[0] @ centring])
    return best(image, scores, max(len(image) // 8, 1))


def textual_row(text):
    k, distances = kernel(text, text)
    centring = np.eye(len(text)) - 1 / len(text)
    scores = 0.7 * distances.mean(axis=1) + 0.3 * np.abs(np.diag(centring @ k @ centring))
    return best(text, scores, max(int(0.2 * len(text)), 1))


def subspace(benign, malicious, k):
    def covariance(rows):
        centred = rows - rows.mean(axis=0)
        return centred.T @ centred / len(rows)

    d = benign.shape[1]
    whiten = np.linalg.inv(sqrtm(covariance(benign) + 1e-6 * np.eye(d)).real)
    values, vectors = np.linalg.eigh(whiten @ covariance(malicious) @ whiten)
    columns = []
    for index in np.argsort(values)[::-1][:k]:
        u = whiten @ vectors[:, index]
        columns.append(u / np.sqrt(u @ u))
    return np.stack(columns, axis=1), benign.mean(axis=0)


def edit(h, visual, textual, alphas, beta):
    """What is added to one token's MLP output."""
    made = []
    for (u, mean), alpha in zip((visual, textual), alphas, strict=True):
        made.append(-alpha * (u @ (u.T @ (h - beta * mean))))
    norms = [np.linalg.norm(d) for d in made]
    if sum(norms) == 0:
        return np.zeros_like(h)
    weight = norms[0] / sum(norms)
    return weight * made[0] + (1 - weight) * made[1]
