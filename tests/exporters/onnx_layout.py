"""What an exported file must look like, read from the file itself."""

import onnx

PAGE = 4096


def external_tensors(model):
    """(tensor, offset, length) of all external data, in the order in which nodes first use it."""
    found = {}

    def visit(graph, outer):
        known = {**outer, **{tensor.name: tensor for tensor in graph.initializer}}
        for node in graph.node:
            for name in node.input:
                if name in known:
                    found.setdefault((name, known[name].SerializeToString()), known[name])
            for attribute in node.attribute:
                for body in [attribute.g, *attribute.graphs]:
                    visit(body, known)

    visit(model.graph, {})
    external = [tensor for tensor in found.values() if tensor.data_location == onnx.TensorProto.EXTERNAL]
    places = [{entry.key: entry.value for entry in tensor.external_data} for tensor in external]
    return [(tensor, int(place["offset"]), int(place["length"])) for tensor, place in zip(external, places)]


def check_layout(path):
    """Aligned, in order of use, nothing large inside, names that are right; returns the external tensors."""
    model = onnx.load(path, load_external_data=False)
    found = external_tensors(model)
    names = {entry.value for tensor, *_ in found for entry in tensor.external_data if entry.key == "location"}
    assert names <= {f"{path.name}.data"}
    assert all(offset % PAGE == 0 for _, offset, _ in found)
    first = list(dict.fromkeys(offset for _, offset, _ in found))
    assert first == sorted(first), "not in order of use"
    assert first[:1] in ([0], [])
    _check_small_inside(model.graph)
    data = path.with_name(f"{path.name}.data")
    if found:
        end = max(offset + length for _, offset, length in found)
        assert end <= data.stat().st_size < end + PAGE and data.stat().st_size % PAGE == 0
    else:
        assert not data.exists()
    text = path.read_bytes()
    for place in (str(path.parent), "/home/", "site-packages"):
        assert place.encode() not in text
    return found


def _check_small_inside(graph):
    for tensor in graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            length = next(int(entry.value) for entry in tensor.external_data if entry.key == "length")
            assert length >= 1024, tensor.name
        else:
            assert len(tensor.raw_data) < 1024, tensor.name
    for node in graph.node:
        assert node.op_type != "Constant" or node.output[0] in {value.name for value in graph.output}
        for attribute in node.attribute:
            for body in [attribute.g, *attribute.graphs]:
                _check_small_inside(body)
