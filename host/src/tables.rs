//! Tables of functions that nothing changes become code, which needs no memory of its own.
//!
//! A module that calls through pointers has a table of what they may point to. For every instance wasmtime takes such a
//! table from the pool, makes room for a reference to each of its functions, fills it in as it is used, and wipes it
//! when the instance ends: a tenth of what a small message costs. Hardly any module ever changes its table, though, and
//! then `call_indirect` can only lead to what the module's own segments say. It is replaced by a call of a function that
//! branches on the pointer (`br_table`) and makes a tail call to where that leads, and the table is left out.
//!
//! What the module does stays the same, down to the names in a backtrace. A pointer that leads nowhere, or to a function
//! of another type, still traps, at `unreachable` in [`NAME`].

use crate::capabilities::TABLE_MAX_ELEMENTS;
use std::borrow::Cow;
use std::convert::Infallible;
use wasm_encoder::reencode::{self, Reencode};
use wasm_encoder::{
    BlockType, CodeSection, Component, ElementSection, Encode as _, Function, FunctionSection, Instruction, Module,
    NameMap, NameSection, TableSection, TypeSection,
};
use wasmparser::{
    BinaryReader, CodeSectionReader, ConstExpr, ElementItems, ElementKind, ElementSectionReader, ExternalKind,
    FuncType, FunctionSectionReader, Name, Operator, OperatorsReader, Parser, Payload, RefType, TableInit,
    TableSectionReader, TypeRef, TypeSectionReader, ValType, Validator, WasmFeatures,
};

/// What a backtrace calls the functions that take the place of a table. They are in none unless a pointer led nowhere.
const NAME: &str = "call_indirect_of_no_such_function";

/// Most branches to replace a table by. What has more keeps it: interpreters, whose time is not that of an instance.
const BRANCHES_MAX: usize = 1 << 16;

/// Sections of a component that hold a module, and another component.
const MODULE_SECTION: u8 = 1;
const COMPONENT_SECTION: u8 = 4;

/// The component, its modules without the tables that they can do without. Bytes that are no valid component stay as they
/// are, for the compiler to say what is wrong with them.
pub fn as_code(component: &[u8]) -> Cow<'_, [u8]> {
    let is_valid = Validator::new_with_features(WasmFeatures::all()).validate_all(component).is_ok();
    is_valid.then(|| changed(component)).flatten().map_or(component.into(), Cow::Owned)
}

fn changed(component: &[u8]) -> Option<Vec<u8>> {
    let sections = component.strip_prefix(&Component::HEADER)?;
    let mut written = Component::HEADER.to_vec();
    let mut reader = BinaryReader::new(sections, 0);
    while !reader.eof() {
        let (id, size) = (reader.read_u8().ok()?, reader.read_var_u32().ok()?);
        let content = reader.read_bytes(size as usize).ok()?;
        let content = match id {
            MODULE_SECTION => without_table(content).map_or(content.into(), Cow::Owned),
            COMPONENT_SECTION => changed(content)?.into(),
            _ => Cow::Borrowed(content),
        };
        written.push(id);
        u32::try_from(content.len()).ok()?.encode(&mut written);
        written.extend_from_slice(&content);
    }
    Some(written)
}

/// The module without its table. Nothing, if it has none or may do more with it than to call through it.
fn without_table(module: &[u8]) -> Option<Vec<u8>> {
    let mut replacement = Replacement(Plan::of(module)?);
    let mut encoded = Module::new();
    replacement.parse_core_module(&mut encoded, Parser::new(0), module).ok()?;
    Some(encoded.finish())
}

/// What a module's table holds, and how it is called through.
#[derive(Default)]
struct Plan {
    types: Vec<FuncType>,
    /// The type of each function, by its number.
    functions: Vec<u32>,
    /// The functions in the table, in their places.
    table: Option<Vec<Option<u32>>>,
    /// The types of all calls through it, in the order of the functions that replace them.
    called: Vec<u32>,
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
                            TypeRef::Func(number) => plan.functions.push(number),
                            TypeRef::FuncExact(_) | TypeRef::Table(_) => return None,
                            _ => {}
                        }
                    }
                }
                Payload::FunctionSection(functions) => {
                    for number in functions {
                        plan.functions.push(number.ok()?);
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
        let branches: usize = plan.called.iter().filter_map(|&of| plan.branches(of)).map(|(_, to)| to.len()).sum();
        (plan.table.is_some() && branches <= BRANCHES_MAX).then_some(plan)
    }

    /// Two types are one where their parameters and results are: of nothing but such types, with parameters and results
    /// that name no others, is that true.
    fn add_types(&mut self, types: TypeSectionReader<'_>) -> Option<()> {
        for group in types {
            let group = group.ok()?;
            let mut members = group.types();
            let (Some(member), None) = (members.next(), members.next()) else { return None };
            let is_plain = |ty: &ValType| match *ty {
                ValType::Ref(ty) => ty == RefType::FUNCREF || ty == RefType::EXTERNREF,
                _ => true,
            };
            match &member.composite_type.inner {
                wasmparser::CompositeInnerType::Func(ty)
                    if member.is_final
                        && member.supertype_idx.is_none()
                        && !member.composite_type.shared
                        && ty.params().iter().chain(ty.results()).all(is_plain) =>
                {
                    self.types.push(ty.clone());
                }
                _ => return None,
            }
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
            let ElementKind::Active { table_index, offset_expr } = segment.kind else { continue };
            let Operator::I32Const { value } = only_operator(&offset_expr)? else { return None };
            if table_index.unwrap_or(0) != 0 {
                return None;
            }
            let functions: Vec<Option<u32>> = match segment.items {
                ElementItems::Functions(functions) => {
                    functions.into_iter().map(|number| number.ok().map(Some)).collect::<Option<_>>()?
                }
                ElementItems::Expressions(_, expressions) => {
                    let function = |expression: ConstExpr<'_>| match only_operator(&expression)? {
                        Operator::RefFunc { function_index } => Some(Some(function_index)),
                        Operator::RefNull { .. } => Some(None),
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
                Operator::CallIndirect { type_index, .. } | Operator::ReturnCallIndirect { type_index, .. }
                    if !self.called.contains(&type_index) =>
                {
                    self.called.push(type_index);
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

    /// Where calls of this type lead: the first pointer that leads anywhere, and the function behind each from there to
    /// the last such.
    fn branches(&self, called: u32) -> Option<(usize, Vec<Option<u32>>)> {
        let wanted = self.types.get(called as usize)?;
        let fits = |&function: &u32| {
            let ty = self.functions.get(function as usize).and_then(|&number| self.types.get(number as usize));
            ty == Some(wanted)
        };
        let places: Vec<_> = self.table.iter().flatten().map(|place| place.filter(fits)).collect();
        let first = places.iter().position(Option::is_some)?;
        let last = places.iter().rposition(Option::is_some)?;
        Some((first, places[first..=last].to_vec()))
    }

    /// The number of the function that replaces calls of this type.
    fn replacement(&self, called: u32) -> Option<u32> {
        let number = self.called.iter().position(|&other| other == called)?;
        u32::try_from(self.functions.len() + number).ok()
    }

    /// The function that replaces calls of this type: their parameters and the pointer are its own.
    fn body(&self, called: u32) -> Function {
        let parameters = u32::try_from(self.types[called as usize].params().len()).unwrap_or(u32::MAX);
        let (first, places) = self.branches(called).unwrap_or_default();
        let mut functions: Vec<u32> = places.iter().copied().flatten().collect();
        functions.sort_unstable();
        functions.dedup();
        let label = |function: &u32| functions.binary_search(function).map_or(functions.len(), |number| number) as u32;
        let nowhere = functions.len() as u32;
        let targets: Vec<u32> = places.iter().map(|place| place.as_ref().map_or(nowhere, label)).collect();
        let mut body = Function::new([]);
        for _ in 0..=functions.len() {
            body.instruction(&Instruction::Block(BlockType::Empty));
        }
        body.instruction(&Instruction::LocalGet(parameters));
        body.instruction(&Instruction::I32Const(first as i32));
        body.instruction(&Instruction::I32Sub);
        body.instruction(&Instruction::BrTable(targets.into(), nowhere));
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

type Written<T = ()> = Result<T, reencode::Error>;

impl Reencode for Replacement {
    type Error = Infallible;

    fn parse_type_section(&mut self, types: &mut TypeSection, section: TypeSectionReader<'_>) -> Written {
        reencode::utils::parse_type_section(self, types, section)?;
        for called in self.0.called.clone() {
            let ty = self.func_type(self.0.types[called as usize].clone())?;
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
        for &called in &self.0.called {
            code.function(&self.0.body(called));
        }
        Ok(())
    }

    fn instruction<'a>(&mut self, operator: Operator<'a>) -> Written<Instruction<'a>> {
        let replacement = |called| self.0.replacement(called).unwrap_or(u32::MAX);
        match operator {
            Operator::CallIndirect { type_index, .. } => Ok(Instruction::Call(replacement(type_index))),
            Operator::ReturnCallIndirect { type_index, .. } => Ok(Instruction::ReturnCall(replacement(type_index))),
            other => reencode::utils::instruction(self, other),
        }
    }

    fn parse_custom_name_subsection(&mut self, names: &mut NameSection, section: Name<'_>) -> Written {
        match section {
            Name::Table(_) | Name::Element(_) => Ok(()),
            Name::Function(given) => {
                let mut functions = NameMap::new();
                for name in given {
                    let name = name?;
                    functions.append(name.index, name.name);
                }
                for &called in &self.0.called {
                    functions.append(self.0.replacement(called).unwrap_or(u32::MAX), NAME);
                }
                names.functions(&functions);
                Ok(())
            }
            other => reencode::utils::parse_custom_name_subsection(self, names, other),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ::fuzz::{check, collection};
    use std::fmt::Write as _;
    use wasmtime::{Engine, Instance, Store, Val};

    const FUNCTIONS: &str = "(type $f (func)) (func $f)";

    fn module(text: &str) -> Vec<u8> {
        wat::parse_str(text).expect("text")
    }

    fn engine() -> Engine {
        Engine::new(&crate::engine::config()).expect("an engine")
    }

    /// An instance of the module, and how many tables it has.
    fn instance(engine: &Engine, module: &[u8]) -> (Store<()>, Instance, u32) {
        let module = wasmtime::Module::new(engine, module).expect("a module");
        let mut store = Store::new(engine, ());
        store.set_epoch_deadline(1);
        let instance = Instance::new(&mut store, &module, &[]).expect("an instance");
        (store, instance, module.resources_required().num_tables)
    }

    /// What its function `call` makes of the pointer: a number, or a trap.
    fn called(store: &mut Store<()>, instance: &Instance, name: &str, pointer: i32) -> Option<i64> {
        let function = instance.get_func(&mut *store, name).expect("a function");
        let mut results = [Val::I64(0)];
        function.call(store, &[Val::I32(pointer)], &mut results).ok()?;
        results[0].i64()
    }

    /// Functions of three types, and three that call through a table with these places and segments.
    fn pointing(places: usize, segments: &[(usize, Vec<usize>)]) -> String {
        let mut text = String::from(
            r#"(module
                (type $a (func (param i64 f64) (result i64)))
                (type $b (func (result i64)))
                (type $c (func (param i32 i32 i32 i32 i32 i32 i32 i32) (result i64)))
                (type $same (func (param i64 f64) (result i64)))
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
                        (i32.const 5) (i32.const 6) (i32.const 7) (i32.const 8) (local.get 0))))"#,
        );
        let _ = writeln!(text, "(table {places} funcref)");
        for (begin, functions) in segments {
            let functions: String = functions.iter().map(|function| format!(" $f{function}")).collect();
            let _ = writeln!(text, "(elem (i32.const {begin}) func{functions})");
        }
        text + ")"
    }

    /// Wherever a pointer leads, the table and the code that stands for it lead there alike, or nowhere.
    #[test]
    fn pointers_lead_where_they_did() {
        let engine = engine();
        let segment = (0..12_usize, collection::vec(0..5_usize, 0..8));
        check("calls through tables", 150, (0..20_usize, collection::vec(segment, 0..4)), |(places, segments)| {
            let fits = |(begin, functions): &(usize, Vec<usize>)| begin + functions.len() <= places;
            let segments: Vec<_> = segments.into_iter().filter(fits).collect();
            let before = module(&pointing(places, &segments));
            let after = without_table(&before).expect("a table that nothing changes");
            let (mut old_store, old, tables) = instance(&engine, &before);
            assert_eq!(tables, 1);
            let (mut new_store, new, tables) = instance(&engine, &after);
            assert_eq!(tables, 0);
            for pointer in (-2..places as i32 + 2).chain([i32::MIN, i32::MAX]) {
                for name in ["a", "b", "c"] {
                    let expected = called(&mut old_store, &old, name, pointer);
                    assert_eq!(called(&mut new_store, &new, name, pointer), expected, "{name} {pointer}");
                }
            }
        });
    }

    /// A table stays that others see, that code looks at or changes, or of which it is not clear what is in it.
    #[test]
    fn a_table_that_may_change_stays() {
        let call = "(type $f (func)) (func $f) (func (param i32) (call_indirect (type $f) (local.get 0)))";
        assert!(
            without_table(&module(&format!("(module {call} (table 2 funcref) (elem (i32.const 1) $f))"))).is_some()
        );
        for text in [
            "(table (export \"table\") 2 funcref)",
            "(import \"a\" \"table\" (table 2 funcref))",
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
            "(table 2 funcref) (elem $e func $f)
                (func (table.init $e (i32.const 0) (i32.const 0) (i32.const 1)) (elem.drop $e))",
            "(table 2 funcref) (elem declare func $f) (func (drop (ref.func $f)))",
            "(import \"a\" \"begin\" (global $begin i32)) (table 2 funcref) (elem (global.get $begin) $f)",
            "(table 2 funcref) (elem (i32.const 2) $f)",
            "(table 2 funcref) (elem (i32.const -1) $f)",
            "(table 30000 funcref)",
            "(rec (type (func)) (type (func (param i32)))) (table 2 funcref)",
            "(type (sub (func))) (table 2 funcref)",
            "(type $s (struct)) (table 2 funcref)",
            "(type (func (param (ref $f)))) (table 2 funcref)",
        ] {
            // Imports come first.
            let text = match text.strip_prefix("(import") {
                Some(rest) => {
                    let end = rest.find("))").map_or(rest.len(), |end| end + 2);
                    format!("(module (import{} {FUNCTIONS} {})", &rest[..end], &rest[end..])
                }
                None => format!("(module {FUNCTIONS} {text})"),
            };
            let text = if text.matches('(').count() > text.matches(')').count() { text + ")" } else { text };
            assert_eq!(without_table(&module(&text)), None, "{text}");
        }
        let types = 3_000;
        let many: String = (0..types).fold(String::new(), |mut many, number| {
            let parameters = (0..12).map(|bit| if number >> bit & 1 == 0 { " i32" } else { " i64" });
            let parameters: String = parameters.collect();
            let _ = write!(many, "(type $t{number} (func (param{parameters}))) (func $a{number} (type $t{number}))");
            let _ = write!(many, "(func $b{number} (type $t{number}))");
            let _ = write!(many, "(func (unreachable) (call_indirect (type $t{number})))");
            many
        });
        let functions = |letter| (0..types).map(move |number| format!(" ${letter}{number}")).collect::<String>();
        let segment = format!("(elem (i32.const 0){}{})", functions('a'), functions('b'));
        assert_eq!(without_table(&module(&format!("(module {many} (table 6000 funcref) {segment})"))), None);
    }

    /// Modules are found in components inside of components; what is no component stays.
    #[test]
    fn components_are_searched() {
        let engine = engine();
        let core = "(core module (type $f (func)) (func $f) (table 2 funcref) (elem (i32.const 1) $f))";
        let nested = "(core instance (instantiate 0))";
        let text = format!("(component (component {core} {nested}) (instance (instantiate 0)) {core} {nested})");
        let component = module(&text);
        let tables = |bytes: &[u8]| {
            let component = wasmtime::component::Component::new(&engine, bytes).expect("a component");
            component.resources_required().expect("no imports").num_tables
        };
        assert_eq!(tables(&component), 2);
        assert_eq!(tables(&as_code(&component)), 0);
        for other in [&component[..component.len() - 1], &module(&format!("(module {FUNCTIONS})")), b"\0asm", b""] {
            assert_eq!(*as_code(other), *other);
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
        let after = without_table(&module(text)).expect("a table that nothing changes");
        let (mut store, instance, _) = instance(&engine(), &after);
        let triage = instance.get_typed_func::<i32, i64>(&mut store, "triage").expect("a function");
        for (pointer, name) in [(1, "broken"), (0, NAME)] {
            let trap = format!("{:?}", triage.call(&mut store, pointer).expect_err("a trap"));
            assert!(trap.contains(&format!("!{name}")) && trap.contains("!triage"), "{trap}");
        }
    }
}
