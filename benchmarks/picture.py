"""A picture for newcomers: why windows make γ and β cheap on a label map."""

import numpy as np

from spade_fast import SemanticLayout

from . import layouts

# Light, so that letters can be read on them. The largest regions get the first colours.
COLOURS = (
    "#8fc1e3",
    "#f6c177",
    "#a3d9a5",
    "#eb9a94",
    "#c3aee0",
    "#f2e394",
    "#8fd6cf",
    "#f4b6d2",
    "#c8b195",
    "#b5bd6b",
    "#9fa8da",
)
UNLABELLED, INK = "#e6e6e6", "#202020"
CLASSES = 182  # of COCO-Stuff; number 182 is "don't care"
WINDOW = 5  # rows and columns of the receptive field of two 3 × 3 convolutions
REACH = WINDOW // 2
PLACES = 4  # how many places of each window are framed at most


def save_picture(path, labels, instances=None, size=256):
    """Draws a label map, up to four of its windows, and the pixels that are computed, as a PNG or
    in the format of the path's suffix.

    Args:
        path: the file to write.
        labels: integers [height, width], COCO-Stuff's classes 0 to 181, and 255 where there is no
            label.
        instances: integers [height, width], or None.
        size: height and width that labels and instances are resized to, 16 or more.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    labels, instances = layouts.resized(labels, instances, (size, size))
    layout = SemanticLayout.from_labels(
        labels[None], CLASSES, None if instances is None else instances[None], dont_care=255
    )
    index = layout.windows((size, size), 3).index[0].numpy()
    colours = code_colours(layout)[layout.codes[0].numpy()]
    windows = choose_windows(index, labels)

    figure = plt.figure(figsize=(9, 3.5), facecolor="white")
    # 512 pixels wide and high, so that 256 × 256 pixels are drawn as squares of the same size.
    panels = [
        figure.add_axes((left / 1800, 124 / 700, 512 / 1800, 512 / 700)) for left in (36, 644, 1252)
    ]
    panels[0].imshow(colours, interpolation="nearest")
    frame_places(panels[0], windows, size)
    show_windows(panels[1], windows, colours)
    first = np.unique(index, return_index=True)[1]
    computed = 0.3 * colours + 0.7
    computed.reshape(-1, 3)[first] = matplotlib.colors.to_rgb(INK)
    panels[2].imshow(computed, interpolation="nearest")

    edges = "" if instances is None else "\nDarker: instances' edges."
    texts = (
        (
            f"Labels, {size} × {size}",
            "γ and β at a pixel depend only on the 5 × 5\nlabels around it. Some windows are"
            f" framed.{edges}",
        ),
        (
            "The framed windows, enlarged",
            "The same window gives the same γ and β,\nwherever it lies. Computed once, they serve\n"
            f"all {len(windows['A']):,} pixels with window A.",
        ),
        (
            "The pixels that are computed",
            f"One for each distinct window, black here:\n{len(first):,} of {index.size:,}. The"
            " other pixels look up\n"
            "the γ and β of their window.",
        ),
    )
    for panel, (title, text) in zip(panels, texts):
        panel.set(xticks=[], yticks=[])
        panel.set_title(title, loc="left", fontsize=10, weight="bold", color=INK)
        panel.text(
            0,
            -0.03,
            text,
            transform=panel.transAxes,
            va="top",
            fontsize=8,
            linespacing=1.3,
            color=INK,
        )
    figure.savefig(path, dpi=200)
    plt.close(figure)


def code_colours(layout):
    """Red, green and blue of each code, float [P, 3]: the colour of its label, darker for codes of
    instances' edges.
    """
    from matplotlib.colors import to_rgb

    palette = layout.palette.numpy()
    label, edge = palette[:, : CLASSES + 1].argmax(1), palette[:, CLASSES + 1 :].any(1)
    area = np.bincount(label[layout.codes.numpy().ravel()], minlength=CLASSES + 1)
    rank = np.argsort(
        np.argsort(-area[:CLASSES], kind="stable")
    )  # 0 for the label with the largest area
    names = [
        UNLABELLED if number == CLASSES else COLOURS[rank[number] % len(COLOURS)]
        for number in label
    ]
    return np.array([to_rgb(name) for name in names]) * np.where(edge, 0.62, 1)[:, None]


def choose_windows(index, labels):
    """The most frequent window, the most frequent windows on two borders between labels, and a rare
    window where many labels meet.

    Returns a dictionary from letters to the first row and column of every place of that window, int
    [count, 2].
    """
    inside = index[REACH:-REACH, REACH:-REACH]  # windows that do not reach beyond the picture
    _, first, counts = np.unique(inside, return_index=True, return_counts=True)
    kinds = [frozenset(around(labels, divmod(place, inside.shape[1])).flat) for place in first]
    order = np.argsort(-counts, kind="stable")
    best = {}
    for number in order:
        best.setdefault(kinds[number], number)
    borders = [number for kind, number in best.items() if len(kind) > 1]
    rare = max(order, key=lambda number: (-counts[number], len(kinds[number])))
    chosen = dict.fromkeys([order[0], *borders[:2], rare])  # in a plain map some coincide
    return {
        letter: np.argwhere(inside == inside.flat[first[number]])
        for letter, number in zip("ABCD", chosen)
    }


def around(values, place):
    """The part of values [height, width, ...] inside a window. place: its first row and column."""
    row, column = place
    return values[row : row + WINDOW, column : column + WINDOW]


def frame_places(axes, windows, size):
    """Frames a few places of each window, with its letter, where there is room. The rare window
    comes first, because it has the fewest places.
    """
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    framed = []
    for letter, places in reversed(windows.items()):
        for number in range(PLACES):
            border = np.minimum(places, size - WINDOW - places).min(
                1
            )  # a frame may be nearer to the border than to other frames
            room = np.min(
                [3 * border, *(np.hypot(*(places - other).T) for other in framed)], axis=0
            )
            if number and room.max() < WINDOW + 0.06 * size:  # width of a frame and its letter
                break
            row, column = place = places[room.argmax()]
            framed.append(place)
            for colour, width in ("white", 2.4), (INK, 1):
                axes.add_patch(
                    Rectangle(
                        (column - 0.5, row - 0.5),
                        WINDOW,
                        WINDOW,
                        fill=False,
                        edgecolor=colour,
                        linewidth=width,
                    )
                )
            axes.annotate(
                letter,
                (column + WINDOW - 0.5, row + REACH),
                (2.5, 0),
                textcoords="offset points",
                va="center_baseline",
                fontsize=8,
                weight="bold",
                color=INK,
                path_effects=[withStroke(linewidth=2, foreground="white")],
            )


def show_windows(axes, windows, colours):
    """Draws the windows as large squares, two by two, each with its letter and its number of
    pixels.
    """
    axes.axis("off")
    for number, (letter, places) in enumerate(windows.items()):
        tile = axes.inset_axes((0.54 * (number % 2), 0.59 - 0.52 * (number // 2), 0.41, 0.41))
        tile.imshow(around(colours, places[0]))
        tile.set(
            xticks=np.arange(0.5, WINDOW - 1),
            yticks=np.arange(0.5, WINDOW - 1),
            xticklabels=[],
            yticklabels=[],
        )
        tile.grid(color="white", linewidth=1)
        tile.tick_params(length=0)
        tile.set_xlabel(
            f"$\\bf{{{letter}}}$: {len(places):,} pixel{'s' if len(places) > 1 else ''}",
            fontsize=8,
            color=INK,
            labelpad=3,
        )
