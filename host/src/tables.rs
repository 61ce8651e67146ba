//! Tables of functions that nothing changes become code, which needs no memory of its own.
//!
//! A module that calls through pointers has a table of what they may point to. For every instance wasmtime takes such a
//! table from the pool, makes room for a reference to each of its functions, fills it in as it is used, and wipes it
//! when the instance ends: a tenth of what a small message costs. Hardly any module ever changes its table, though, and
//! then `call_indirect` can only lead to what the module's own segments say. It is replaced by a call of a function that
//! branches on the pointer (`br_table`) and makes a tail call to where that leads, and the table is left out.
//!
//! What the module does stays the same. A pointer that leads nowhere, or to a function of another type, still traps, at
//! `unreachable` in [`NAME`]; a function that made a tail call by it is in the backtrace no longer. A call takes 2 to 3 ns
//! more than through a table that is filled in, and up to 10 with more parameters than fit into registers.

use crate::capabilities::TABLE_MAX_ELEMENTS;
use std::borrow::Cow;
use std::collections::HashMap;
use wasm_encoder::reencode::{self, Reencode};
use wasm_encoder::{
    BlockType, CodeSection, Component, ElementSection, Encode as _, Function, FunctionSection, Instruction, Module,
    NameSection, TableSection, TypeSection,
};
use wasmparser::{
    BinaryReader, CodeSectionReader, ConstExpr, ElementItems, ElementKind, ElementSectionReader, ExternalKind,
    FuncType, FunctionSectionReader, HeapType, Name, Operator, OperatorsReader, Parser, Payload, RefType, TableInit,
    TableSectionReader, TypeRef, TypeSectionReader, ValType, Validator, WasmFeatures,
};

/// What a backtrace calls the functions that take the place of a table. They are in none unless a pointer led nowhere.
const NAME: &str = "call_indirect_of_no_such_function";

/// Most bytes of code to replace the tables of a component by. What takes more keeps them: interpreters, whose time is not
/// that of an instance.
const CODE_MAX_BYTES: usize = 256 << 10;

/// Most parameters of a call that is replaced.
const PARAMETERS_MAX: usize = 16;

/// How deep components may lie in each other whose modules are replaced.
const DEPTH_MAX: usize = 16;

/// Sections of a component that hold a module, and another component.
const MODULE_SECTION: u8 = 1;
const COMPONENT_SECTION: u8 = 4;

/// The component, its modules without the tables that they can do without. Bytes that are no valid component stay as they
/// are, for the compiler to say what is wrong with them.
pub fn as_code(component: &[u8]) -> Cow<'_, [u8]> {
    if Validator::new_with_features(WasmFeatures::all()).validate_all(component).is_err() {
        return component.into();
    }
    rewritten(component, DEPTH_MAX, &mut { CODE_MAX_BYTES }).map_or(component.into(), Cow::Owned)
}

/// The component with other modules. Nothing, if all stay.
fn rewritten(component: &[u8], depth: usize, budget: &mut usize) -> Option<Vec<u8>> {
    let sections = component.strip_prefix(&Component::HEADER)?;
    let mut written = Component::HEADER.to_vec();
    let mut reader = BinaryReader::new(sections, 0);
    let mut is_changed = false;
    while !reader.eof() {
        let (id, size) = (reader.read_u8().ok()?, reader.read_var_u32().ok()?);
        let content = reader.read_bytes(size as usize).ok()?;
        let other = match id {
            MODULE_SECTION => without_table(content, budget),
            COMPONENT_SECTION if depth > 0 => rewritten(content, depth - 1, budget),
            _ => None,
        };
        is_changed |= other.is_some();
        let content = other.as_deref().unwrap_or(content);
        written.push(id);
        content.encode(&mut written);
    }
    is_changed.then_some(written)
}

/// The module without its table. Nothing, if it has none, may do more with it than to call through it, or takes more code
/// than there may be.
fn without_table(module: &[u8], budget: &mut usize) -> Option<Vec<u8>> {
    let mut replacement = Replacement(Plan::of(module)?);
    *budget = budget.checked_sub(replacement.0.code_max_bytes())?;
    let mut encoded = Module::new();
    replacement.parse_core_module(&mut encoded, Parser::new(0), module).ok()?;
    Some(encoded.finish())
}

/// What a module's table holds, and how it is called through.
#[derive(Default)]
struct Plan {
    /// The signature of each type, by its number.
    types: Vec<usize>,
    signatures: Vec<Signature>,
    /// The signature of each function, by its number.
    functions: Vec<usize>,
    /// The functions in the table, in their places.
    table: Option<Vec<Option<u32>>>,
    /// The signatures of calls through it, in the order of the functions that replace them.
    called: Vec<usize>,
}

/// What types with the same parameters and results have in common.
struct Signature {
    ty: FuncType,
    /// The function that replaces calls through the table, by its number in [`Plan::called`].
    replacement: Option<usize>,
    /// Where the table has functions of these types, and which.
    places: Vec<(usize, u32)>,
}

impl Plan {
    fn of(module: &[u8]) -> Option<Self> {
        let mut plan = Self::default();
        for payload in Parser::new(0).parse_all(module) {
            match payload.ok()? {
                Payload::TypeSection(types) => plan.add_types(types)?,
                Payload::ImportSection(imports) => {
                    for import in imports.into_imports() {
                        match import.ok()?.ty {
                            TypeRef::Func(number) => plan.functions.push(*plan.types.get(number as usize)?),
                            TypeRef::FuncExact(_) | TypeRef::Table(_) => return None,
                            _ => {}
                        }
                    }
                }
                Payload::FunctionSection(functions) => {
                    for number in functions {
                        plan.functions.push(*plan.types.get(number.ok()? as usize)?);
                    }
                }
                Payload::TableSection(tables) => plan.add_table(tables)?,
                Payload::ExportSection(exports) => {
                    for export in exports {
                        if export.ok()?.kind == ExternalKind::Table {
                            return None;
                        }
                    }
                }
                Payload::ElementSection(segments) => plan.add_segments(segments)?,
                Payload::CodeSectionEntry(body) => plan.add_calls(body.get_operators_reader().ok()?)?,
                _ => {}
            }
        }
        for (place, function) in plan.table.as_ref()?.iter().enumerate() {
            if let Some(function) = *function {
                let signature = *plan.functions.get(function as usize)?;
                plan.signatures[signature].places.push((place, function));
            }
        }
        Some(plan)
    }

    /// Final types without supertypes, alone in their group, that name no other types, are equal exactly if their
    /// parameters and results are.
    fn add_types(&mut self, types: TypeSectionReader<'_>) -> Option<()> {
        let mut known = HashMap::new();
        for group in types {
            let group = group.ok()?;
            let mut members = group.types();
            let (Some(member), None) = (members.next(), members.next()) else { return None };
            let wasmparser::CompositeInnerType::Func(ty) = &member.composite_type.inner else { return None };
            let names_none = |ty: &ValType| match *ty {
                ValType::Ref(ty) => ty == RefType::FUNCREF || ty == RefType::EXTERNREF,
                _ => true,
            };
            let is_plain = member.is_final && member.supertype_idx.is_none() && !member.composite_type.shared;
            if !is_plain || !ty.params().iter().chain(ty.results()).all(names_none) {
                return None;
            }
            let signature = *known.entry(ty.clone()).or_insert_with(|| {
                self.signatures.push(Signature { ty: ty.clone(), replacement: None, places: Vec::new() });
                self.signatures.len() - 1
            });
            self.types.push(signature);
        }
        Some(())
    }

    fn add_table(&mut self, tables: TableSectionReader<'_>) -> Option<()> {
        let mut tables = tables.into_iter();
        let table = tables.next()?.ok()?;
        let places = usize::try_from(table.ty.initial).ok().filter(|&places| places <= TABLE_MAX_ELEMENTS)?;
        let is_plain = table.ty.element_type == RefType::FUNCREF && !table.ty.table64 && !table.ty.shared;
        let is_only_one = tables.next().is_none() && matches!(table.init, TableInit::RefNull);
        (is_plain && is_only_one).then(|| self.table = Some(vec![None; places]))
    }

    fn add_segments(&mut self, segments: ElementSectionReader<'_>) -> Option<()> {
        for segment in segments {
            let segment = segment.ok()?;
            let ElementKind::Active { offset_expr, .. } = segment.kind else { return None };
            let Operator::I32Const { value } = only_operator(&offset_expr)? else { return None };
            let functions: Vec<Option<u32>> = match segment.items {
                ElementItems::Functions(functions) => {
                    functions.into_iter().map(|number| number.ok().map(Some)).collect::<Option<_>>()?
                }
                ElementItems::Expressions(_, expressions) => {
                    let function = |expression: ConstExpr<'_>| match only_operator(&expression)? {
                        Operator::RefFunc { function_index } => Some(Some(function_index)),
                        Operator::RefNull { hty: HeapType::FUNC } => Some(None),
                        _ => None,
                    };
                    expressions.into_iter().map(|expression| function(expression.ok()?)).collect::<Option<_>>()?
                }
            };
            let begin = value.cast_unsigned() as usize;
            let places = self.table.as_mut()?.get_mut(begin..begin.checked_add(functions.len())?)?;
            places.copy_from_slice(&functions);
        }
        Some(())
    }

    fn add_calls(&mut self, mut code: OperatorsReader<'_>) -> Option<()> {
        while !code.eof() {
            match code.read().ok()? {
                Operator::CallIndirect { type_index, .. } | Operator::ReturnCallIndirect { type_index, .. } => {
                    let number = *self.types.get(type_index as usize)?;
                    let signature = &mut self.signatures[number];
                    if signature.ty.params().len() > PARAMETERS_MAX {
                        return None;
                    }
                    signature.replacement.get_or_insert_with(|| {
                        self.called.push(number);
                        self.called.len() - 1
                    });
                }
                Operator::TableGet { .. }
                | Operator::TableSet { .. }
                | Operator::TableSize { .. }
                | Operator::TableGrow { .. }
                | Operator::TableFill { .. }
                | Operator::TableCopy { .. }
                | Operator::TableInit { .. }
                | Operator::ElemDrop { .. }
                | Operator::RefFunc { .. } => return None,
                _ => {}
            }
        }
        Some(())
    }

    /// How much the functions that replace calls take at most.
    fn code_max_bytes(&self) -> usize {
        self.called().map(Signature::code_max_bytes).sum()
    }

    fn called(&self) -> impl Iterator<Item = &Signature> {
        self.called.iter().map(|&signature| &self.signatures[signature])
    }

    /// The number of the function that replaces calls of this type.
    fn replacement(&self, called: u32) -> Option<u32> {
        let signature = &self.signatures[*self.types.get(called as usize)?];
        u32::try_from(self.functions.len() + signature.replacement?).ok()
    }
}

impl Signature {
    fn code_max_bytes(&self) -> usize {
        // A label, a block and a call have numbers of at most 3 bytes here, a parameter one of one.
        const OF_FUNCTION: usize = 40;
        let span = self.places.first().zip(self.places.last()).map_or(0, |(first, last)| last.0 - first.0 + 1);
        OF_FUNCTION + 3 * span + self.places.len() * (2 * self.ty.params().len() + 10)
    }

    /// The function that replaces calls: their parameters and the pointer are its own.
    fn body(&self) -> Function {
        let parameters = self.ty.params().len() as u32;
        let mut functions: Vec<u32> = self.places.iter().map(|&(_, function)| function).collect();
        functions.sort_unstable();
        functions.dedup();
        let nowhere = functions.len() as u32;
        let first = self.places.first().map_or(0, |&(place, _)| place);
        let mut labels = Vec::new();
        for &(place, function) in &self.places {
            labels.resize(place - first, nowhere);
            labels.push(functions.partition_point(|&other| other < function) as u32);
        }
        let mut body = Function::new([]);
        for _ in 0..=functions.len() {
            body.instruction(&Instruction::Block(BlockType::Empty));
        }
        body.instruction(&Instruction::LocalGet(parameters));
        body.instruction(&Instruction::I32Const(first as i32));
        body.instruction(&Instruction::I32Sub);
        body.instruction(&Instruction::BrTable(labels.into(), nowhere));
        for function in functions {
            body.instruction(&Instruction::End);
            for parameter in 0..parameters {
                body.instruction(&Instruction::LocalGet(parameter));
            }
            body.instruction(&Instruction::ReturnCall(function));
        }
        body.instruction(&Instruction::End);
        body.instruction(&Instruction::Unreachable);
        body.instruction(&Instruction::End);
        body
    }
}

/// The one operator of a constant expression that has no more.
fn only_operator<'a>(expression: &ConstExpr<'a>) -> Option<Operator<'a>> {
    let mut operators = expression.get_operators_reader();
    let operator = operators.read().ok()?;
    matches!(operators.read().ok()?, Operator::End).then_some(operator)
}

/// Writes the module that a plan is of, as planned.
struct Replacement(Plan);

type Written<T = ()> = Result<T, reencode::Error<Unplanned>>;

/// A call that the plan does not know. There is none in the module that it is of.
#[derive(Debug)]
struct Unplanned;

impl Reencode for Replacement {
    type Error = Unplanned;

    fn parse_type_section(&mut self, types: &mut TypeSection, section: TypeSectionReader<'_>) -> Written {
        reencode::utils::parse_type_section(self, types, section)?;
        for signature in 0..self.0.called.len() {
            let ty = self.0.signatures[self.0.called[signature]].ty.clone();
            let ty = self.func_type(ty)?;
            let parameters = [ty.params(), &[wasm_encoder::ValType::I32]].concat();
            types.ty().function(parameters, ty.results().iter().copied());
        }
        Ok(())
    }

    fn parse_function_section(
        &mut self,
        functions: &mut FunctionSection,
        section: FunctionSectionReader<'_>,
    ) -> Written {
        reencode::utils::parse_function_section(self, functions, section)?;
        for number in 0..self.0.called.len() {
            functions.function((self.0.types.len() + number) as u32);
        }
        Ok(())
    }

    fn parse_table_section(&mut self, _tables: &mut TableSection, _section: TableSectionReader<'_>) -> Written {
        Ok(())
    }

    fn parse_element_section(&mut self, _segments: &mut ElementSection, _section: ElementSectionReader<'_>) -> Written {
        Ok(())
    }

    fn parse_code_section(&mut self, code: &mut CodeSection, section: CodeSectionReader<'_>) -> Written {
        reencode::utils::parse_code_section(self, code, section)?;
        for signature in self.0.called() {
            code.function(&signature.body());
        }
        Ok(())
    }

    fn instruction<'a>(&mut self, operator: Operator<'a>) -> Written<Instruction<'a>> {
        let replacement = |called| self.0.replacement(called).ok_or(reencode::Error::UserError(Unplanned));
        match operator {
            Operator::CallIndirect { type_index, .. } => replacement(type_index).map(Instruction::Call),
            Operator::ReturnCallIndirect { type_index, .. } => replacement(type_index).map(Instruction::ReturnCall),
            other => reencode::utils::instruction(self, other),
        }
    }

    fn parse_custom_name_subsection(&mut self, names: &mut NameSection, section: Name<'_>) -> Written {
        match section {
            Name::Table(_) | Name::Element(_) => {}
            Name::Function(given) => {
                let mut functions = reencode::utils::name_map(given, Ok)?;
                for number in 0..self.0.called.len() {
                    functions.append((self.0.functions.len() + number) as u32, NAME);
                }
                names.functions(&functions);
            }
            other => reencode::utils::parse_custom_name_subsection(self, names, other)?,
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ::fuzz::{any, check, collection};
    use std::fmt::Write as _;
    use wasmtime::{Engine, Instance, Store, Val};

    fn module(text: &str) -> Vec<u8> {
        wat::parse_str(text).expect("text")
    }

    fn without(module: &[u8]) -> Option<Vec<u8>> {
        without_table(module, &mut { CODE_MAX_BYTES })
    }

    fn engine() -> Engine {
        Engine::new(&crate::engine::config()).expect("an engine")
    }

    /// An instance of the module, which may import a function, and how many tables it has.
    fn instance(engine: &Engine, module: &[u8]) -> (Store<()>, Instance, u32) {
        let module = wasmtime::Module::new(engine, module).expect("a module");
        let mut store = Store::new(engine, ());
        store.set_epoch_deadline(1);
        let imported: Vec<_> = module.imports().map(|_| wasmtime::Func::wrap(&mut store, || 5_i64).into()).collect();
        let instance = Instance::new(&mut store, &module, &imported).expect("an instance");
        (store, instance, module.resources_required().num_tables)
    }

    /// What its function of this name makes of the pointer: a number, or nothing if it traps.
    fn called(store: &mut Store<()>, instance: &Instance, name: &str, pointer: i32) -> Option<i64> {
        let function = instance.get_func(&mut *store, name).expect("a function");
        let mut results = [Val::I64(0)];
        function.call(store, &[Val::I32(pointer)], &mut results).ok()?;
        results[0].i64()
    }

    /// Functions of three types, one of them imported, and four that call through a table with these places and segments,
    /// the last one with a type that no function has. A segment is written as functions or as expressions, of which some
    /// are null.
    fn pointing(places: usize, segments: &[Segment]) -> String {
        let mut text = String::from(
            r#"(module
                (type $a (func (param i64 f64) (result i64)))
                (type $b (func (result i64)))
                (type $c (func (param i32 i32 i32 i32 i32 i32 i32 i32) (result i64)))
                (type $same (func (param i64 f64) (result i64)))
                (type $d (func (param f32) (result i64)))
                (import "" "" (func $f5 (type $b)))
                (func $f0 (type $a) (i64.add (local.get 0) (i64.trunc_f64_s (local.get 1))))
                (func $f1 (type $same) (i64.sub (local.get 0) (i64.trunc_f64_s (local.get 1))))
                (func $f2 (type $b) (i64.const 2))
                (func $f3 (type $b) (i64.const 3))
                (func $f4 (type $c) (i64.extend_i32_u (i32.add (local.get 0) (local.get 7))))
                (func (export "a") (param i32) (result i64)
                    (call_indirect (type $a) (i64.const 40) (f64.const 2) (local.get 0)))
                (func (export "b") (param i32) (result i64) (return_call_indirect (type $b) (local.get 0)))
                (func (export "c") (param i32) (result i64)
                    (i64.add (i64.const 1) (call_indirect (type $c)
                        (i32.const 1) (i32.const 2) (i32.const 3) (i32.const 4)
                        (i32.const 5) (i32.const 6) (i32.const 7) (i32.const 8) (local.get 0))))
                (func (export "d") (param i32) (result i64) (call_indirect (type $d) (f32.const 1) (local.get 0)))"#,
        );
        let _ = writeln!(text, "(table {places} funcref)");
        for (begin, functions, are_expressions) in segments {
            let item = |function: &usize| match (are_expressions, function) {
                (false, 0..6) => format!(" $f{function}"),
                (true, 0..6) => format!(" (ref.func $f{function})"),
                (false, _) => " $f0".to_owned(),
                (true, _) => " (ref.null func)".to_owned(),
            };
            let items: String = functions.iter().map(item).collect();
            let kind = if *are_expressions { "funcref" } else { "func" };
            let _ = writeln!(text, "(elem (i32.const {begin}) {kind}{items})");
        }
        text + ")"
    }

    /// Where it begins, its functions, and whether they are written as expressions.
    type Segment = (usize, Vec<usize>, bool);

    /// Wherever a pointer leads, the table and the code that stands for it lead there alike, or nowhere.
    #[test]
    fn pointers_lead_where_they_did() {
        let engine = engine();
        let segment = (0..12_usize, collection::vec(0..7_usize, 0..8), any::<bool>());
        check("calls through tables", 150, (0..20_usize, collection::vec(segment, 0..4)), |(places, segments)| {
            let fits = |(begin, functions, _): &Segment| begin + functions.len() <= places;
            let segments: Vec<_> = segments.into_iter().filter(fits).collect();
            let before = module(&pointing(places, &segments));
            let after = without(&before).expect("a table that nothing changes");
            let (mut old_store, old, tables) = instance(&engine, &before);
            assert_eq!(tables, 1);
            let (mut new_store, new, tables) = instance(&engine, &after);
            assert_eq!(tables, 0);
            for pointer in (-2..places as i32 + 2).chain([i32::MIN, i32::MAX]) {
                for name in ["a", "b", "c", "d"] {
                    let expected = called(&mut old_store, &old, name, pointer);
                    assert_eq!(called(&mut new_store, &new, name, pointer), expected, "{name} {pointer}");
                }
            }
        });
    }

    /// A table stays that others see, that code looks at or changes, or of which it is not clear what is in it.
    #[test]
    fn a_table_that_may_change_stays() {
        let module = |text: &str| module(&format!("(module {text} (type $f (func)) (func $f (type $f)))"));
        assert!(without(&module("(table 2 funcref) (elem (i32.const 1) $f)")).is_some());
        for text in [
            "",
            r#"(table (export "table") 2 funcref)"#,
            r#"(import "" "" (table 2 funcref))"#,
            "(table 2 funcref) (table 2 funcref)",
            "(table 2 (ref null $f))",
            "(table i64 2 funcref)",
            "(table 2 funcref (ref.func $f))",
            "(table 2 funcref) (func (table.set (i32.const 0) (ref.null func)))",
            "(table 2 funcref) (func (drop (table.get (i32.const 0))))",
            "(table 2 funcref) (func (drop (table.grow (ref.null func) (i32.const 1))))",
            "(table 2 funcref) (func (drop (table.size)))",
            "(table 2 funcref) (func (table.fill (i32.const 0) (ref.null func) (i32.const 1)))",
            "(table 2 funcref) (func (table.copy (i32.const 0) (i32.const 1) (i32.const 1)))",
            "(table 2 funcref) (elem func $f)",
            "(table 2 funcref) (elem $e func $f) (func (elem.drop $e))",
            "(table 2 funcref) (elem declare func $f) (func (drop (ref.func $f)))",
            r#"(import "" "" (global $begin i32)) (table 2 funcref) (elem (global.get $begin) $f)"#,
            "(table 2 funcref) (elem (i32.const 2) $f)",
            "(table 2 funcref) (elem (i32.const -1) $f)",
            "(table 30000 funcref)",
            "(rec (type (func)) (type (func (param i32)))) (table 2 funcref)",
            "(type (sub (func))) (table 2 funcref)",
            "(type (struct)) (table 2 funcref)",
            "(type (func (param (ref $f)))) (table 2 funcref)",
            "(type $many (func (param i32 i32 i32 i32 i32 i32 i32 i32 i32 i32 i32 i32 i32 i32 i32 i32 i32)))
                (table 2 funcref) (func (unreachable) (call_indirect (type $many)))",
        ] {
            assert_eq!(without(&module(text)), None, "{text}");
        }
    }

    /// What takes more code than a component may have for it keeps its table, and it is known beforehand how much that is.
    #[test]
    fn code_has_its_bounds() {
        let mut text =
            String::from("(module (type $f (func (param i32 i64))) (table 1000 funcref) (elem (i32.const 0)");
        (0..1000).for_each(|number| text += &format!(" $f{number}"));
        text += ")";
        (0..1000).for_each(|number| text += &format!("(func $f{number} (type $f) (nop))"));
        let module = module(&(text + "(func (call_indirect (type $f) (i32.const 1) (i64.const 2) (i32.const 3))))"));
        let plan = Plan::of(&module).expect("a plan");
        let written: usize = plan.called().map(|signature| signature.body().byte_len()).sum();
        let (bound, mut budget) = (plan.code_max_bytes(), CODE_MAX_BYTES);
        assert!(written <= bound && bound < 2 * written, "{written} of {bound} bytes");
        let changed = (0..100).filter(|_| without_table(&module, &mut budget).is_some()).count();
        assert_eq!(changed, CODE_MAX_BYTES / bound);
    }

    /// Modules are found in components inside of components, unless that goes too deep; what is no component stays.
    #[test]
    fn components_are_searched() {
        let engine = engine();
        let core = "(core module (type $f (func)) (func $f) (table 2 funcref) (elem (i32.const 1) $f))
            (core instance (instantiate 0))";
        let tables = |bytes: &[u8]| {
            let component = wasmtime::component::Component::new(&engine, bytes).expect("a component");
            component.resources_required().expect("no imports").num_tables
        };
        let nested = |depth: usize| {
            let inner =
                (0..depth).fold(core.to_owned(), |inner, _| format!("(component {inner}) (instance (instantiate 0))"));
            module(&format!("(component {inner} (component {core}) (instance (instantiate 1)))"))
        };
        for (depth, kept) in [(1, 0), (DEPTH_MAX, 0), (DEPTH_MAX + 1, 1)] {
            let component = nested(depth);
            assert_eq!(tables(&component), 2);
            assert_eq!(tables(&as_code(&component)), kept, "{depth}");
        }
        let component = nested(1);
        let without = as_code(&component);
        for other in
            [&*without, &component[..component.len() - 1], &module("(module (table 2 funcref))"), b"\0asm", b""]
        {
            assert!(matches!(as_code(other), Cow::Borrowed(same) if same == other));
        }
    }

    /// A backtrace keeps the names of functions, and says where a pointer led nowhere.
    #[test]
    fn a_backtrace_has_names() {
        let text = r#"(module
            (type $f (func (result i64)))
            (func $broken (type $f) (unreachable))
            (func $triage (export "triage") (param i32) (result i64) (call_indirect (type $f) (local.get 0)))
            (table 2 funcref) (elem (i32.const 1) $broken))"#;
        let after = without(&module(text)).expect("a table that nothing changes");
        let (mut store, instance, _) = instance(&engine(), &after);
        let triage = instance.get_typed_func::<i32, i64>(&mut store, "triage").expect("a function");
        for (pointer, name) in [(1, "broken"), (0, NAME)] {
            let trap = format!("{:?}", triage.call(&mut store, pointer).expect_err("a trap"));
            assert!(trap.contains(&format!("!{name}")) && trap.contains("!triage"), "{trap}");
        }
    }
}
