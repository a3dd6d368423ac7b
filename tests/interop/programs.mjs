// Reads and writes splat files with the libraries of npm, for tools/interop.py, which copies this file beside their node_modules.
//
// Standard input: a JSON array of jobs. Standard output: a JSON array, for each job {"cloud": ...}, {} or {"error": "one line"}.
//   {"program", "do": "read", "path", "format"}               the Gaussians as the program gives them, in plain numbers
//   {"program", "do": "write", "path", "format", "source"}    our .ply `source` read by the program itself and written as `path`
//   {"program", "do": "write", "path", "format", "cloud", "axes"}   for @adobe/spz, which reads no .ply: the numbers of one
//
// A cloud: positions [3N], rotations [4N] (x, y, z, w), scales [3N] and alphas [N] (log and logit, or activated where "activated"
// is true), colors [3N] (spherical harmonics of degree 0, or display sRGB where activated).

import { createReadStream, readFileSync, writeFileSync } from 'node:fs';
import { Readable } from 'node:stream';

const FIELDS = ['positions', 'rotations', 'scales', 'alphas', 'colors'];
// Niantic's names in the order of their numbers; the axes record of a file holds the number.
const AXES = 'UNSPECIFIED LDB RDB LUB RUB LDF RDF LUF RUF LFD RFD LFU RFU LBD RBD LBU RBU'.split(' ');
const [HAS_EXTENSIONS, AXES_RECORD] = [2, 0xadbe0003];

const plain = (cloud) => Object.fromEntries(FIELDS.map((name) => [name, Array.from(cloud[name])]));

const spzJs = async () => {
    const library = await import('spz-js');
    const stream = (path) => Readable.toWeb(createReadStream(path));
    const write = { '.ply': library.serializePly, '.compressed.ply': library.serializeCompressedPly, '.spz 2': library.serializeSpz };
    return {
        read: async ({ path, format }) => plain(await (format === '.ply' ? library.loadPly(stream(path)) : library.loadSpz(readFileSync(path)))),
        write: async ({ source, path, format }) =>
            writeFileSync(path, new Uint8Array(await write[format](await library.loadPly(stream(source)))))
    };
};

const spzLoader = async () => {
    // Its package was built for browsers: seeing Node it calls a function that was bundled away. This is how Electron's windows look.
    process.type = 'renderer';
    const { loadSpz } = await import('@spz-loader/core');
    const options = { unpackOptions: { coordinateSystem: 'RDF' } };
    return { read: async ({ path }) => ({ ...plain(await loadSpz(new Uint8Array(readFileSync(path)), options)), activated: true }) };
};

// A version 4 file with the record that names its axes, from one without records.
const withAxes = (bytes, number) => {
    const record = Buffer.alloc(12);
    [AXES_RECORD, 4, number].forEach((value, i) => record.writeUInt32LE(value, 4 * i));
    const header = Buffer.from(bytes.slice(0, 32));
    header[14] |= HAS_EXTENSIONS;
    header.writeUInt32LE(32 + record.length, 16);
    return new Uint8Array(Buffer.concat([header, record, Buffer.from(bytes.slice(32))]));
};

const adobe = async () => {
    const { default: create } = await import('@adobe/spz');
    const quiet = { print: () => {}, printErr: () => {} };
    const library = await create(quiet);
    const { UNSPECIFIED, RDF } = library.CoordinateSystem;
    const pack = (cloud, version, from) => library.saveSpzToBuffer(cloud, { version, from, sh1Bits: 5, shRestBits: 4 });
    return {
        read: async ({ path }) => {
            const cloud = library.loadSpzFromBuffer(new Uint8Array(readFileSync(path)), { to: RDF });
            if (!cloud.numPoints) throw new Error('no Gaussians');
            return plain(cloud);
        },
        write: async ({ cloud, axes, path, format }) => {
            const arrays = Object.fromEntries(FIELDS.map((name) => [name, new Float32Array(cloud[name])]));
            let out = { numPoints: cloud.alphas.length, shDegree: 0, antialiased: false, extensions: [], sh: new Float32Array(0), ...arrays };
            if (axes) {
                // It takes records from a file only, not from the caller: read one that has the record, then write with it.
                const stated = withAxes(pack(out, 4, UNSPECIFIED), AXES.indexOf(axes));
                out = Object.assign(library.loadSpzFromBuffer(stated, { to: UNSPECIFIED }), arrays);
            }
            writeFileSync(path, pack(out, Number(format.split(' ')[1]), RDF));
        }
    };
};

const MAKERS = { 'spz-js': spzJs, '@spz-loader/core': spzLoader, '@adobe/spz': adobe };
const libraries = {};
const answers = [];
// What the libraries say must not mix with the answer; their last line is the error where they say what is wrong and return nothing.
let said = '';
console.log = console.warn = console.error = (...parts) => (said = parts.join(' '));
for (const job of JSON.parse(readFileSync(0, 'utf8'))) {
    said = '';
    try {
        libraries[job.program] ??= await MAKERS[job.program]();
        const cloud = await libraries[job.program][job.do](job);
        answers.push(cloud ? { cloud } : {});
    } catch (error) {
        answers.push({ error: (said || String(error.message ?? error)).trim().split('\n')[0] });
    }
}
process.stdout.write(JSON.stringify(answers));
