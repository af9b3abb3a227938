// Label maps as PNG: a number in each pixel. A canvas has only colours, and would change the numbers
// of a paletted or a 16-bit map.

const SIGNATURE = [137, 80, 78, 71, 13, 10, 26, 10];
const GREY = 0, PALETTED = 3;
const MOST_PIXELS = 2 ** 25;

const CHECKS = Uint32Array.from({ length: 256 }, (_, number) => {
  for (let bit = 0; bit < 8; bit++) number = number & 1 ? 0xedb88320 ^ (number >>> 1) : number >>> 1;
  return number;
});

function check(bytes) {
  let sum = 0xffffffff;
  for (const byte of bytes) sum = CHECKS[(sum ^ byte) & 255] ^ (sum >>> 8);
  return (sum ^ 0xffffffff) >>> 0;
}

function joined(parts) {
  const whole = new Uint8Array(parts.reduce((length, part) => length + part.length, 0));
  let place = 0;
  for (const part of parts) {
    whole.set(part, place);
    place += part.length;
  }
  return whole;
}

/** The bytes after a transform stream. Throws an Error if there are more than `most`. */
async function passed(bytes, stream, most = Infinity) {
  const reader = new Blob([bytes]).stream().pipeThrough(stream).getReader();
  const parts = [];
  for (let length = 0; ; ) {
    const { done, value } = await reader.read();
    if (done) return joined(parts);
    length += value.length;
    if (length > most) {
      await reader.cancel();
      throw new Error("it has more data than its size allows");
    }
    parts.push(value);
  }
}

function chunk(kind, content) {
  const bytes = new Uint8Array(content.length + 12);
  const view = new DataView(bytes.buffer);
  view.setUint32(0, content.length);
  bytes.set([...kind].map((letter) => letter.charCodeAt(0)), 4);
  bytes.set(content, 8);
  view.setUint32(content.length + 8, check(bytes.subarray(4, content.length + 8)));
  return bytes;
}

/** A PNG, as a Blob, of numbers row by row: a Uint8Array gives 8 bits each, a Uint16Array 16. */
export async function writePng(numbers, width, height) {
  const size = numbers.BYTES_PER_ELEMENT, length = 1 + width * size;
  const rows = new DataView(new ArrayBuffer(height * length)); // each begins with 0: no filter
  for (let place = 0; place < numbers.length; place++) {
    const at = Math.floor(place / width) * length + 1 + (place % width) * size;
    if (size === 1) rows.setUint8(at, numbers[place]);
    else rows.setUint16(at, numbers[place]);
  }
  const header = new DataView(new ArrayBuffer(13));
  header.setUint32(0, width);
  header.setUint32(4, height);
  header.setUint8(8, 8 * size);
  header.setUint8(9, GREY);
  const content = await passed(rows.buffer, new CompressionStream("deflate"));
  const parts = [
    new Uint8Array(SIGNATURE),
    chunk("IHDR", new Uint8Array(header.buffer)),
    chunk("IDAT", content),
    chunk("IEND", new Uint8Array(0)),
  ];
  return new Blob(parts, { type: "image/png" });
}

/** {width, height, numbers} of a PNG's bytes: its grey values, or its palette indices. Throws an
    Error in words if it is not a whole PNG, or if it has colours. */
export async function readPng(bytes) {
  if (SIGNATURE.some((byte, place) => bytes[place] !== byte)) throw new Error("it is not a PNG");
  const { header, content } = chunks(bytes);
  const width = header.getUint32(0), height = header.getUint32(4);
  const depth = header.getUint8(8), kind = header.getUint8(9);
  if (kind !== GREY && kind !== PALETTED) {
    throw new Error("it has colours; a label map has one number in each pixel");
  }
  if (header.getUint8(12) !== 0) throw new Error("it is interlaced; save it without interlacing");
  if (width * height < 1 || width * height > MOST_PIXELS) {
    throw new Error(`it is ${width} × ${height}, which is too large or empty`);
  }
  const length = Math.ceil((width * depth) / 8);
  const rows = await passed(content, new DecompressionStream("deflate"), height * (length + 1));
  if (rows.length !== height * (length + 1)) throw new Error("it is incomplete");
  unfilter(rows, length, Math.max(1, depth / 8));
  const numbers = new Uint16Array(width * height);
  for (let y = 0, place = 0; y < height; y++) {
    const row = rows.subarray(y * (length + 1) + 1, (y + 1) * (length + 1));
    for (let x = 0; x < width; x++) numbers[place++] = numberAt(row, x, depth);
  }
  return { width, height, numbers };
}

function chunks(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const parts = [];
  let header = null;
  for (let place = 8; place + 12 <= bytes.length; ) {
    const length = view.getUint32(place), end = place + 8 + length;
    if (end + 4 > bytes.length) break;
    if (check(bytes.subarray(place + 4, end)) !== view.getUint32(end)) {
      throw new Error("it is damaged: a checksum is wrong");
    }
    const kind = String.fromCharCode(...bytes.subarray(place + 4, place + 8));
    if (kind === "IHDR") header = new DataView(bytes.slice(place + 8, end).buffer);
    if (kind === "IDAT") parts.push(bytes.subarray(place + 8, end));
    if (kind === "IEND" && header?.byteLength === 13) return { header, content: joined(parts) };
    place = end + 4;
  }
  throw new Error("it is incomplete");
}

/** Undoes PNG's filters in place: the first byte of each row is its filter. */
function unfilter(rows, length, step) {
  for (let start = 0; start < rows.length; start += length + 1) {
    const filter = rows[start];
    if (filter > 4) throw new Error("it is damaged: a filter is unknown");
    for (let x = 1; x <= length; x++) {
      const at = start + x;
      const left = x > step ? rows[at - step] : 0;
      const above = start ? rows[at - length - 1] : 0;
      const corner = x > step && start ? rows[at - length - 1 - step] : 0;
      rows[at] += [0, left, above, (left + above) >> 1, nearest(left, above, corner)][filter];
    }
  }
}

/** Paeth's predictor. */
function nearest(left, above, corner) {
  const guess = left + above - corner;
  const [a, b, c] = [left, above, corner].map((value) => Math.abs(guess - value));
  return a <= b && a <= c ? left : b <= c ? above : corner;
}

function numberAt(row, x, depth) {
  if (depth === 16) return (row[2 * x] << 8) | row[2 * x + 1];
  if (depth === 8) return row[x];
  const bit = x * depth;
  return (row[bit >> 3] >> (8 - depth - (bit & 7))) & ((1 << depth) - 1);
}
