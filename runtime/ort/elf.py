"""A linker for machines without one, and for others' libraries: ELF object files in, one shared library out.

Owns the part of ELF that the compiled kernels and shim use (System V ABI): allocated sections, a global offset table,
call stubs for libc, the dynamic section. What differs between architectures is for
:mod:`srigl_fx.runtime.ort.relocations`. It must not know what it links. No lazy binding, no unwinding tables, no debug
information.
"""

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from srigl_fx.errors import LibraryError
from srigl_fx.runtime.ort.relocations import MACHINES, STUB_SIZE, Machine

_SHT_PROGBITS, _SHT_SYMTAB, _SHT_RELA, _SHT_NOBITS = 1, 2, 4, 8
_SHF_WRITE, _SHF_ALLOC, _SHF_EXECINSTR = 1, 2, 4
_SHN_UNDEF, _SHN_ABS = 0, 0xFFF1
_PT_LOAD, _PT_DYNAMIC, _PT_GNU_STACK = 1, 2, 0x6474E551
_READ, _READ_EXECUTE, _READ_WRITE = 4, 5, 6
_DT_NEEDED, _DT_HASH, _DT_STRTAB, _DT_SYMTAB, _DT_RELA, _DT_RELASZ, _DT_RELAENT = 1, 4, 5, 6, 7, 8, 9
_DT_STRSZ, _DT_SYMENT, _DT_SONAME = 10, 11, 14
_DT_FLAGS_1, _DF_1_NODELETE = 0x6FFFFFFB, 8
_GLOBAL_FUNCTION = 0x12
ET_REL, ET_DYN = 1, 3  # an object file, a shared library
_HEADER_SIZE, _PROGRAM_HEADER_SIZE, _SYMBOL_SIZE, _RELA_SIZE = 64, 56, 24, 24
_SEGMENTS = 5


@dataclass
class _Section:
    name: int
    kind: int
    flags: int
    data: bytes
    size: int
    align: int
    link: int
    info: int
    address: int = -1  # -1: not placed
    is_unwinding: bool = False

    @property
    def is_loaded(self) -> bool:
        """Whether it belongs into memory; unwinding tables (on x86-64 a section type of their own) stay out."""
        is_wanted = self.size > 0 and not self.is_unwinding
        return is_wanted and bool(self.flags & _SHF_ALLOC) and self.kind in (_SHT_PROGBITS, _SHT_NOBITS)


@dataclass(frozen=True)
class _Symbol:
    name: str
    is_global: bool
    section: int
    value: int


@dataclass(frozen=True)
class _Relocation:
    section: _Section
    offset: int
    kind: int
    symbol: int
    addend: int


def machine_of(data: bytes, *, kind: int) -> Machine | None:
    """The architecture of an ELF file of this kind (``ET_REL`` or ``ET_DYN``); None if it is none that is known.

    Example:
        >>> machine_of(b"no library", kind=ET_DYN) is None
        True
    """
    if data[:6] != b"\x7fELF\x02\x01" or len(data) < _HEADER_SIZE:
        return None
    found, number = struct.unpack_from("<HH", data, 16)
    return next((machine for machine in MACHINES if (found, machine.number) == (kind, number)), None)


@dataclass
class ObjectFile:
    """One relocatable object: its architecture, sections, symbols and relocations."""

    machine: Machine
    sections: list[_Section] = field(default_factory=list)
    symbols: list[_Symbol] = field(default_factory=list)
    relocations: list[_Relocation] = field(default_factory=list)

    @classmethod
    def parse(cls, data: bytes) -> "ObjectFile":
        """Read an object file.

        Raises:
            LibraryError: The bytes are no 64-bit little-endian object of x86-64 or of Arm.
        """
        machine = machine_of(data, kind=ET_REL)
        if machine is None:
            raise LibraryError("not an x86-64 or Arm ELF object file; delete the cached library and build again")
        (offset,) = struct.unpack_from("<Q", data, 40)
        _, count, names_in = struct.unpack_from("<HHH", data, 58)
        file = cls(machine)
        for i in range(count):
            called, kind, flags, _, start, size, link, info, align, _ = struct.unpack_from(
                "<IIQQQQIIQQ", data, offset + 64 * i
            )
            content = b"" if kind == _SHT_NOBITS else data[start : start + size]
            file.sections.append(_Section(called, kind, flags, content, size, max(align, 1), link, info))
        for section in file.sections:
            section.is_unwinding = file.sections[names_in].data[section.name :].startswith(b".eh_frame\0")
        for section in file.sections:
            if section.kind == _SHT_SYMTAB:
                names = file.sections[section.link].data
                for name, info, _, where, value, _ in struct.iter_unpack("<IBBHQQ", section.data):
                    end = names.index(b"\0", name)
                    file.symbols.append(_Symbol(names[name:end].decode(), info >> 4 != 0, where, value))
            elif section.kind == _SHT_RELA and file.sections[section.info].is_loaded:
                file.relocations += [
                    _Relocation(file.sections[section.info], where, info & 0xFFFFFFFF, info >> 32, addend)
                    for where, info, addend in struct.iter_unpack("<QQq", section.data)
                ]
        return file


def undefined_symbols(objects: Iterable[bytes]) -> set[str]:
    """The names that a set of object files uses and none of them defines.

    Raises:
        LibraryError: One of them is no object file of x86-64 or of Arm.
    """
    symbols = [symbol for data in objects for symbol in ObjectFile.parse(data).symbols if symbol.is_global]
    defined = {symbol.name for symbol in symbols if symbol.section != _SHN_UNDEF}
    return {symbol.name for symbol in symbols} - defined


def _align(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment


class _Linker:
    """One link: sections get addresses, then symbols, then relocations are applied. Offsets in the file = addresses."""

    def __init__(self, objects: Sequence[bytes], exports: Sequence[str], soname: str, needed: Sequence[str]) -> None:
        self.files = [ObjectFile.parse(data) for data in objects]
        self.exports, self.soname, self.needed = tuple(exports), soname, tuple(needed)
        self.imports = sorted(undefined_symbols(objects))
        self.definitions = {
            symbol.name: (file, symbol)
            for file in self.files
            for symbol in file.symbols
            if symbol.is_global and symbol.section != _SHN_UNDEF
        }
        missing = [name for name in self.exports if name not in self.definitions]
        if missing:
            raise LibraryError(f"cannot link {soname}: no object defines {', '.join(missing)}")
        first, *others = (file.machine for file in self.files)
        if any(other is not first for other in others):
            raise LibraryError(f"cannot link {soname}: some objects are for {first.name}, and some are not")
        self.machine = first
        self.dynamic_symbols = (*self.imports, *self.exports)
        self.image = bytearray()
        self.rela: list[tuple[int, int, int]] = []
        self.got: dict[tuple[int, int] | str, int] = {}
        self.stubs: dict[str, int] = {}

    def link(self) -> bytes:
        """Lay out, relocate, write the tables."""
        self._plan_tables()
        self._place()
        self.image = bytearray(self.file_end)
        for section in self._loaded():
            self.image[section.address : section.address + len(section.data)] = section.data
        for file in self.files:
            for relocation in file.relocations:
                self._relocate(file, relocation)
        self._write_got()
        self._write_tables()
        self._write_headers()
        return bytes(self.image)

    def _loaded(self) -> Iterator[_Section]:
        return (section for file in self.files for section in file.sections if section.is_loaded)

    def _key(self, file: ObjectFile, index: int) -> tuple[int, int] | str:
        symbol = file.symbols[index]
        return symbol.name if symbol.is_global else (id(file), index)

    def _plan_tables(self) -> None:
        """Count what relocation will need, so that the tables have their sizes before anything has an address."""
        absolute = 0
        for file in self.files:
            for relocation in file.relocations:
                name = file.symbols[relocation.symbol].name
                if relocation.kind in self.machine.through_table:
                    self.got.setdefault(self._key(file, relocation.symbol), 0)
                elif relocation.kind in self.machine.calls and name in self.imports:
                    self.stubs.setdefault(name, 0)
                    self.got.setdefault(name, 0)
                elif relocation.kind == self.machine.absolute:
                    absolute += 1
                elif relocation.kind not in self.machine.direct | self.machine.calls:
                    raise LibraryError(
                        f"cannot link: relocation type {relocation.kind} of {name!r}; install a C compiler"
                    )
        self.rela_count = absolute + len(self.got)
        self.strings = b"\0".join(
            [b"", *(name.encode() for name in (*self.dynamic_symbols, *self.needed, self.soname)), b""]
        )

    def _string(self, name: str) -> int:
        return self.strings.index(b"\0" + name.encode() + b"\0") + 1

    def _place_sections(self, position: int, wanted: int, kind: int = _SHT_PROGBITS) -> int:
        for section in self._loaded():
            if section.kind == kind and section.flags & (_SHF_WRITE | _SHF_EXECINSTR) == wanted:
                section.address = _align(position, section.align)
                position = section.address + section.size
        return position

    def _place(self) -> None:
        """Addresses: one segment to read, one to execute, one to write."""
        self.hash = _align(_HEADER_SIZE + _SEGMENTS * _PROGRAM_HEADER_SIZE, 8)
        self.symtab = _align(self.hash + 4 * (4 + len(self.dynamic_symbols)), 8)
        self.strtab = self.symtab + _SYMBOL_SIZE * (1 + len(self.dynamic_symbols))
        self.relatab = _align(self.strtab + len(self.strings), 8)
        self.read_end = self._place_sections(self.relatab + _RELA_SIZE * self.rela_count, 0)

        self.text = _align(self.read_end, self.machine.page)
        position = _align(self._place_sections(self.text, _SHF_EXECINSTR), STUB_SIZE)
        for name in self.stubs:
            self.stubs[name] = position
            position += STUB_SIZE
        self.text_end = position

        self.writable = _align(self.text_end, self.machine.page)
        position = self.writable
        for key in self.got:
            self.got[key] = position
            position += 8
        self.dynamic = _align(position, 16)
        self.dynamic_size = 16 * (10 + len(self.needed) + 1)
        self.file_end = self._place_sections(self.dynamic + self.dynamic_size, _SHF_WRITE)
        self.memory_end = self._place_sections(self.file_end, _SHF_WRITE, _SHT_NOBITS)

    def _address(self, file: ObjectFile, index: int) -> int | None:
        """Where a symbol is; None if it is imported."""
        symbol = file.symbols[index]
        if symbol.is_global:
            if symbol.name not in self.definitions:
                return None
            file, symbol = self.definitions[symbol.name]
        if symbol.section >= _SHN_ABS or not file.sections[symbol.section].is_loaded:
            raise LibraryError(f"cannot link: {symbol.name!r} is in no loaded section; install a C compiler")
        return file.sections[symbol.section].address + symbol.value

    def _relocate(self, file: ObjectFile, relocation: _Relocation) -> None:
        place = relocation.section.address + relocation.offset
        target = self._address(file, relocation.symbol)
        name = file.symbols[relocation.symbol].name
        if relocation.kind == self.machine.absolute:
            if target is None:
                symbol = self.dynamic_symbols.index(name) + 1
                self.rela.append((place, symbol << 32 | self.machine.absolute, relocation.addend))
            else:
                self.rela.append((place, self.machine.relative, target + relocation.addend))
            return
        if relocation.kind in self.machine.through_table:
            target = self.got[self._key(file, relocation.symbol)]
        elif target is None:
            if name not in self.stubs:
                raise LibraryError(f"cannot link: {name!r} is imported data; install a C compiler")
            target = self.stubs[name]
        self.machine.write(self.image, place, relocation.kind, target + relocation.addend)

    def _write_got(self) -> None:
        addresses = {
            self._key(file, index): self._address(file, index)
            for file in self.files
            for index in range(len(file.symbols))
            if self._key(file, index) in self.got
        }
        for key, slot in self.got.items():
            address = addresses[key]
            if address is None:
                assert isinstance(key, str), "only global names are imported"
                self.rela.append((slot, self.dynamic_symbols.index(key) + 1 << 32 | self.machine.from_table, 0))
            else:
                self.rela.append((slot, self.machine.relative, address))
        for name, stub in self.stubs.items():
            code = self.machine.stub(stub, self.got[name])
            self.image[stub : stub + len(code)] = code

    def _write_tables(self) -> None:
        count = len(self.dynamic_symbols)
        # One hash bucket: a chain through all symbols.
        chain = [0, *range(2, count + 1), 0] if count else [0]
        struct.pack_into(f"<{3 + len(chain)}I", self.image, self.hash, 1, len(chain), min(count, 1), *chain)
        for i, name in enumerate(self.dynamic_symbols):
            entry = self.symtab + _SYMBOL_SIZE * (i + 1)
            section, address = 0, 0
            if name in self.exports:
                file, symbol = self.definitions[name]
                section, address = 1, file.sections[symbol.section].address + symbol.value
            struct.pack_into("<IBBHQQ", self.image, entry, self._string(name), _GLOBAL_FUNCTION, 0, section, address, 0)
        self.image[self.strtab : self.strtab + len(self.strings)] = self.strings
        for i, entry_ in enumerate(self.rela):
            struct.pack_into("<QQq", self.image, self.relatab + _RELA_SIZE * i, *entry_)
        entries = [
            *((_DT_NEEDED, self._string(name)) for name in self.needed),
            (_DT_SONAME, self._string(self.soname)),
            (_DT_HASH, self.hash),
            (_DT_STRTAB, self.strtab),
            (_DT_SYMTAB, self.symtab),
            (_DT_STRSZ, len(self.strings)),
            (_DT_SYMENT, _SYMBOL_SIZE),
            (_DT_RELA, self.relatab),
            (_DT_RELASZ, _RELA_SIZE * len(self.rela)),
            (_DT_RELAENT, _RELA_SIZE),
            # It stays in its process. ONNX Runtime closes it with the last session, and opens it anew with the next,
            # which would know nothing of the domain that was made before, and make another.
            (_DT_FLAGS_1, _DF_1_NODELETE),
            (0, 0),
        ]
        for i, (tag, value) in enumerate(entries):
            struct.pack_into("<QQ", self.image, self.dynamic + 16 * i, tag, value)

    def _write_headers(self) -> None:
        identity = b"\x7fELF\x02\x01\x01" + bytes(9)
        header = struct.pack(
            "<16sHHIQQQIHHHHHH",
            identity,
            ET_DYN,
            self.machine.number,
            1,
            0,
            64,
            0,
            0,
            64,
            _PROGRAM_HEADER_SIZE,
            _SEGMENTS,
            0,
            0,
            0,
        )
        self.image[:_HEADER_SIZE] = header
        page = self.machine.page
        segments = (
            (_PT_LOAD, _READ, 0, self.read_end, self.read_end, page),
            (_PT_LOAD, _READ_EXECUTE, self.text, self.text_end - self.text, self.text_end - self.text, page),
            (
                _PT_LOAD,
                _READ_WRITE,
                self.writable,
                self.file_end - self.writable,
                self.memory_end - self.writable,
                page,
            ),
            (_PT_DYNAMIC, _READ_WRITE, self.dynamic, self.dynamic_size, self.dynamic_size, 8),
            (_PT_GNU_STACK, _READ_WRITE, 0, 0, 0, 16),
        )
        for i, (kind, flags, start, in_file, in_memory, align) in enumerate(segments):
            position = _HEADER_SIZE + _PROGRAM_HEADER_SIZE * i
            struct.pack_into(
                "<IIQQQQQQ", self.image, position, kind, flags, start, start, start, in_file, in_memory, align
            )


def link_shared(
    objects: Sequence[bytes], *, exports: Sequence[str], soname: str, needed: Sequence[str] = ("libc.so.6",)
) -> bytes:
    """Link object files into a shared library.

    Args:
        objects: The content of each ELF object, all of one architecture.
        exports: The names that the library offers; all others stay inside.
        soname: The library's own name.
        needed: Libraries that hold what no object defines.

    Returns:
        The content of the library.

    Raises:
        LibraryError: An object needs something this linker does not do, or an export is defined nowhere.

    Example:
        >>> link_shared([b"no object"], exports=("f",), soname="libf.so")
        Traceback (most recent call last):
        srigl_fx.errors.LibraryError: not an x86-64 or Arm ELF object file; delete the cached library and build again
    """
    return _Linker(objects, exports, soname, needed).link()
